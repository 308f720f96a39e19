"""Responses that can be referred to are bounded in number and bytes."""

from __future__ import annotations

from localrun.server.responses_store import ResponseStore

ITEMS = [{"role": "user"}]  # 17 bytes as JSON
BODY = {"id": "1234567"}  # 16


def names(store: ResponseStore) -> list[str]:
    return [name for name in "abcd" if name in store._kept]


def put(store: ResponseStore, *responses: str) -> None:
    for name in responses:
        store.put(name, ITEMS, [], BODY)


def test_the_one_used_longest_ago_goes_first() -> None:
    store = ResponseStore(2, 1000)
    put(store, "a", "b")
    kept = store.get("a")
    assert kept is not None
    assert (kept.items, kept.output, kept.body, kept.n_bytes) == (ITEMS, [], BODY, 33)
    put(store, "c")
    assert names(store) == ["a", "c"]
    assert store.get("b") is None


def test_bytes_are_bounded() -> None:
    store = ResponseStore(10, 70)
    put(store, "a", "b", "c")
    assert names(store) == ["b", "c"]
    store.put("d", [], [], {"text": "x" * 70})
    assert names(store) == ["b", "c"], "too large for any place"
    store.put("d", [], [], {"text": "x" * 50})
    assert names(store) == ["d"]


def test_a_second_response_of_a_name_takes_the_first_one_s_place() -> None:
    store = ResponseStore(10, 70)
    put(store, "a", "b", "b", "b")
    assert names(store) == ["a", "b"]


def test_what_is_dropped_makes_room() -> None:
    store = ResponseStore(10, 70)
    put(store, "a", "b")
    assert store.drop("a")
    assert not store.drop("a")
    put(store, "c")
    assert names(store) == ["b", "c"]
