"""What a grounded answer is worth: structure, faithfulness, the oracle cited, absence admitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baton.data.chunks import same
from baton.eval.bootstrap import LEVEL, Interval, bootstrap_mean, percentiles, resampled_sums
from baton.eval.qa import exact_match, f1
from baton.eval.score import Score, ScoreSheet, score_pairs
from baton.pipelines.raft.format import Format


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, judged against the documents it was given.

    `found` of `quotes` quotes stand verbatim (white space aside) in a document.
    """

    is_structured: bool
    quotes: int
    found: int
    cites_oracle: bool
    admits_absence: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What an answer was given and is compared with; `oracle` is an index, None where absent."""

    documents: Sequence[str]
    oracle: int | None
    reference: str


def judge(answer: str, documents: Sequence[str], *, oracle: int | None, format: Format) -> Verdict:
    """Judge one answer. The oracle is cited by its number, or by a quote from it."""
    quotes = [same(quote) for quote in format.quotes_of(answer)]
    texts = [same(text) for text in documents]
    homes = [{i for i, text in enumerate(texts) if quote and quote in text} for quote in quotes]
    cited = oracle is not None and (
        oracle + 1 in format.cited(answer) or any(oracle in home for home in homes)
    )
    return Verdict(
        is_structured=format.is_structured(answer),
        quotes=len(quotes),
        found=sum(bool(home) for home in homes),
        cites_oracle=cited,
        admits_absence=format.admits_absence(answer),
    )


def score_answers(
    answers: Sequence[str], given: Sequence[Given], format: Format, *, seed: int, resamples: int
) -> ScoreSheet:
    """Every score, separately for rows that show their oracle and rows that do not.

    Scores of one group cannot be compared row by row over all rows, so there are none per sample.
    """
    scores: list[Score] = []
    for group, is_present in (("present", True), ("absent", False)):
        pairs = [
            (answer, row)
            for answer, row in zip(answers, given, strict=True)
            if (row.oracle is not None) == is_present
        ]
        if pairs:
            scores += _Group(group, pairs, format, seed, resamples).scores()
    return ScoreSheet(scores=scores, seed=seed, resamples=resamples)


@dataclass(frozen=True)
class _Group:
    """The scores of the rows of one kind."""

    name: str
    pairs: Sequence[tuple[str, Given]]
    format: Format
    seed: int
    resamples: int

    def scores(self) -> list[Score]:
        verdicts = [
            judge(answer, row.documents, oracle=row.oracle, format=self.format)
            for answer, row in self.pairs
        ]
        scores = self._faithfulness(verdicts)
        if self.name == "present":
            scores.append(
                self._share(
                    "oracle_cited",
                    "answers that cite the oracle, by its number or by a quote from it",
                    [verdict.cites_oracle for verdict in verdicts],
                )
            )
        scores += [
            self._share(
                "absence_admitted",
                "answers that say that the documents hold too little evidence",
                [verdict.admits_absence for verdict in verdicts],
            ),
            self._share("structure", self._order(), [v.is_structured for v in verdicts]),
            self._share(
                "quoted", "answers with at least one quote", [v.quotes > 0 for v in verdicts]
            ),
        ]
        if self.format.answer_marker is not None:
            scores += [self._short("exact_match", exact_match), self._short("f1", f1)]
        return scores + self._texts()

    def _order(self) -> str:
        if self.format.headings:
            return f"answers with all {len(self.format.headings)} headings, each once, in order"
        return f"answers that end in {(self.format.answer_marker or '').strip()} and a short answer"

    def _share(self, name: str, convention: str, values: Sequence[bool]) -> Score:
        interval = bootstrap_mean(
            [float(v) for v in values], seed=self.seed, resamples=self.resamples
        )
        return self._score(name, convention, interval, n=len(values))

    def _faithfulness(self, verdicts: Sequence[Verdict]) -> list[Score]:
        """Found quotes by all quotes; no score where nothing was quoted: 0 of 0 is no number."""
        counts = np.array([[v.found, v.quotes] for v in verdicts], dtype=np.float64)
        found, quotes = counts.sum(axis=0)
        if quotes == 0:
            return []
        sums = resampled_sums(counts, seed=self.seed, resamples=self.resamples)
        drawn = sums[sums[:, 1] > 0]
        low, high = percentiles(drawn[:, 0] / drawn[:, 1], level=LEVEL)
        interval = Interval(mean=float(found / quotes), low=low, high=high)
        convention = "quotes found verbatim in a given document, white space aside"
        return [self._score("faithfulness", convention, interval, n=int(quotes))]

    def _short(self, name: str, measure: Callable[[str, str], float]) -> Score:
        values = [
            measure(self.format.final_answer(answer), self.format.final_answer(row.reference))
            for answer, row in self.pairs
        ]
        interval = bootstrap_mean(values, seed=self.seed, resamples=self.resamples)
        convention = "SQuAD: lower case, no punctuation, no articles; Chinese by character"
        return self._score(name, convention, interval, n=len(values), tokenizer="char")

    def _texts(self) -> list[Score]:
        """ROUGE and BLEU as in medical_qa, under names of this group."""
        sheet = score_pairs(
            [answer for answer, _ in self.pairs],
            [row.reference for _, row in self.pairs],
            seed=self.seed,
            resamples=self.resamples,
        )
        return [
            replace(
                score,
                column=f"{score.column}_{self.name}",
                name=f"{score.name} ({self._rows})",
            )
            for score in sheet.scores
        ]

    @property
    def _rows(self) -> str:
        return f"oracle {self.name}"

    def _score(
        self, name: str, convention: str, interval: Interval, *, n: int, tokenizer: str = ""
    ) -> Score:
        return Score.of(
            interval,
            n=n,
            column=f"{name}_{self.name}",
            name=f"{name} ({self._rows})",
            tokenizer=tokenizer,
            convention=convention,
        )
