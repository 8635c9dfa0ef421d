"""What is derived from an Idempotency-Key, and what is no key."""

from __future__ import annotations

import pytest

from kvbaton.errors import InvalidRequestError
from services.gateway.http.idempotency import DerivedRng, read_key

PARTS = {"tenant": "acme", "key": "k", "model": "demo", "body": b"{}"}


def drawn(**values: object) -> tuple[str, int, int]:
    rng = DerivedRng(**{**PARTS, **values})  # type: ignore[arg-type]
    return rng.new_id(), rng.new_seed(), rng.new_seed()


def test_the_same_parts_give_the_same_everywhere() -> None:
    _, seed, other_seed = drawn()
    # Written down: gateways of different versions must agree while they are replaced one by one.
    assert drawn() == (
        "0af9902826e94e6aa69a4102876fe801",
        6604350158905775977,
        other_seed,
    )
    assert seed != other_seed
    assert 0 <= other_seed < 2**63


def test_each_part_counts_and_none_runs_into_the_next() -> None:
    others = [
        drawn(tenant="bolt"),
        drawn(key="l"),
        drawn(model="other"),
        drawn(body=b"{ }"),
        drawn(tenant="acmek", key=""),
        drawn(tenant="", key="acmek"),
    ]
    assert len({drawn(), *others}) == 7


def test_keys_of_a_sane_form_are_taken() -> None:
    assert read_key([]) is None
    for key in ("a", "8e03978e-40d5-43e8-bc93-6894a57f9324", "x" * 255, 'quoted "key"'):
        assert read_key([key]) == key


@pytest.mark.parametrize("values", [[""], ["x" * 256], ["\xe9"], ["a\tb"], ["a", "a"]])
def test_other_keys_are_refused_by_name(values: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match="Idempotency-Key") as error:
        read_key(values)
    assert error.value.field == "Idempotency-Key"
