"""The eval records of one experiment as a CSV, three plots and one page, and what is missing."""
