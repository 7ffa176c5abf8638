"""A Docker engine as a site: what its file may say, and what it is told instead."""

from __future__ import annotations

import pytest

from baton.config.decode import decode
from baton.config.docker_site import DockerSite
from baton.config.home import launch_folder
from baton.config.site import load_site
from baton.errors import ConfigError


def test_the_defaults_need_nothing_but_the_launcher_s_name() -> None:
    site = decode(DockerSite, {"launcher": "docker"})
    assert (site.image, site.store, site.gpus, site.user) == ("baton", "runs", "auto", "auto")


@pytest.mark.parametrize("name", ["docker", "rented-gpu"])
def test_the_sites_that_come_with_baton_are_read(name: str) -> None:
    assert (launch_folder() / f"{name}.yaml").is_file()
    assert isinstance(load_site(name), DockerSite)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"host": "root@machine"}, "host must be ssh://USER@MACHINE, tcp://… or unix://…, got"),
        ({"volume": "/root/runs"}, "a folder belongs into store"),
        ({"cache": "a/b"}, "cache must be a volume's name or an absolute path, got 'a/b'"),
        ({"user": "me"}, "user must be auto or numbers such as 1000:1000, got 'me'"),
        ({"env": ["HF_TOKEN=hf_secret"]}, "env: names of variables only, got 'HF_TOKEN=…'"),
        ({"mounts": ["data:data"]}, "mounts: expected /folder:/container or"),
        ({"flags": ["--env=X=1"]}, "flags: --env is not yours to give here; use env or env_file"),
        ({"flags": ["--rm"]}, "flags: --rm is not yours to give here; baton sets it itself"),
        ({"flags": ["-v /a:/b"]}, "flags: expected --name or --name=value, got '-v /a:/b'"),
        ({"gpus": [0], "processes": 2}, "a task of 2 processes needs as many GPUs, got gpus [0]"),
        ({"gpu": "all"}, "did you mean"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_with_what_to_do(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        decode(DockerSite, {"launcher": "docker"} | values)
    assert said in str(error.value)
    assert "hf_secret" not in str(error.value)
