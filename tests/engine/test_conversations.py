"""Conversations survive crashes, damage and other programs; nothing that was written is lost by editing."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localrun.engine.conversations import (
    Attachment,
    ConversationError,
    ConversationStore,
    DamagedConversationsError,
    Message,
    StoreThread,
    database,
    salvage,
)
from localrun.engine.conversations.export import export_json, export_markdown, slug, write_export


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ConversationStore]:
    with ConversationStore.open(tmp_path / "c.sqlite3") as opened:
        yield opened


def exchange(store: ConversationStore, conversation_id: int, parent: int | None, *texts: str) -> list[int]:
    """Adds messages below each other, user first."""
    ids = []
    for number, text in enumerate(texts):
        parent = store.add(conversation_id, parent, "assistant" if number % 2 else "user", text).id
        ids.append(parent)
    return ids


def texts_on_view(store: ConversationStore, conversation_id: int) -> list[str]:
    return [message.content for message in store.branch(conversation_id)]


def test_what_was_added_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    with ConversationStore.open(path) as store:
        talk = store.create("Title", {"think": "high"})
        message = store.add(
            talk.id, None, "user", "look at this", attachments=[Attachment("a.txt", "text\x1b[0m", 3)], details={"x": 1}
        )
    with ConversationStore.open(path) as store:
        assert store.conversation(talk.id).settings == {"think": "high"}
        (again,) = store.branch(talk.id)
        assert again == message
        assert again.attachments == (Attachment("a.txt", "text\x1b[0m", 3),)


def test_editing_makes_a_sibling_and_switching_back_shows_the_old_branch_as_it_was_left(
    store: ConversationStore,
) -> None:
    talk = store.create().id
    first, answer, second, _ = exchange(store, talk, None, "q1", "a1", "q2", "a2")
    edited = store.add(talk, answer, "user", "q2 edited").id
    assert texts_on_view(store, talk) == ["q1", "a1", "q2 edited"]
    assert store.children(talk)[answer] == (second, edited)
    store.show(talk, second)
    assert texts_on_view(store, talk) == ["q1", "a1", "q2", "a2"]
    new_start = store.add(talk, None, "user", "another start").id
    assert texts_on_view(store, talk) == ["another start"]
    assert store.children(talk)[None] == (first, new_start)
    store.show(talk, first)
    assert texts_on_view(store, talk) == ["q1", "a1", "q2", "a2"]


def test_show_goes_down_to_the_child_that_was_last_on_view_not_the_newest(store: ConversationStore) -> None:
    talk = store.create().id
    question, old = exchange(store, talk, None, "q", "old")
    new = store.add(talk, question, "assistant", "new").id
    store.show(talk, old)
    other = store.add(talk, None, "user", "other start").id
    store.show(talk, question)
    assert texts_on_view(store, talk) == ["q", "old"]
    store.show(talk, new)
    store.show(talk, other)
    store.show(talk, question)
    assert texts_on_view(store, talk) == ["q", "new"]


def test_rewind_hides_the_end_and_keeps_it_as_a_branch(store: ConversationStore) -> None:
    talk = store.create().id
    _, answer, second, _ = exchange(store, talk, None, "q1", "a1", "q2", "a2")
    store.rewind(talk, answer)
    assert texts_on_view(store, talk) == ["q1", "a1"]
    store.show(talk, second)
    assert texts_on_view(store, talk) == ["q1", "a1", "q2", "a2"]
    store.rewind(talk, None)
    assert texts_on_view(store, talk) == []


def test_list_is_ordered_by_last_writing_and_rename_and_delete_work(store: ConversationStore) -> None:
    old, new = store.create("old"), store.create("new")
    store.add(old.id, None, "user", "wake up")
    assert [c.title for c in store.conversations()] == ["old", "new"]
    store.rename(new.id, "  renamed ")
    assert store.conversation(new.id).title == "renamed"
    store.delete(old.id)
    assert [c.id for c in store.conversations()] == [new.id]
    assert store.children(old.id) == {}
    with pytest.raises(KeyError):
        store.conversation(old.id)


def test_search_finds_all_words_in_any_case_and_script_in_every_branch(store: ConversationStore) -> None:
    one, two = store.create("About Straßen").id, store.create("b").id
    question, _ = exchange(store, one, None, "How WIDE is a street?", "call `get_street_width(x)`")
    store.add(one, question, "assistant", "hidden branch: Straße")
    exchange(store, two, None, "ΣΊΣΥΦΟΣ pushes", "a stone")
    assert [hit.snippet for hit in store.search("street wide")] == ["How WIDE is a street?"]
    assert [hit.role for hit in store.search("STRASSE")] == ["title", "assistant"]
    assert [hit.conversation_id for hit in store.search("σίσυφος")] == [two]
    assert store.search("street_width")[0].message_id is not None
    assert store.search("stone", conversation_id=one) == []
    assert store.search("   ") == []


def test_search_treats_no_character_as_a_pattern(store: ConversationStore) -> None:
    talk = store.create().id
    exchange(store, talk, None, "100% of a_b", "100 of aXb")
    assert len(store.search("100%")) == 1
    assert len(store.search("a_b")) == 1
    assert store.search('"') == []


def test_snippet_shows_the_place_of_the_word_in_a_long_text(store: ConversationStore) -> None:
    talk = store.create().id
    exchange(store, talk, None, "blah " * 1000 + "needle" + " blah" * 1000)
    (hit,) = store.search("needle")
    assert "needle" in hit.snippet
    assert len(hit.snippet) < 200


def test_an_answer_is_saved_as_it_grows_and_survives_kill(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    program = """
import os, signal, sys
from pathlib import Path
from localrun.engine.conversations import ConversationStore
store = ConversationStore.open(Path(sys.argv[1]))
talk = store.create("t").id
q = store.add(talk, None, "user", "q").id
a = store.add(talk, q, "assistant", "", state="writing")
for n in range(50):
    a = store.write(a, content="word " * n, reasoning="hm", state="writing")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with ConversationStore.open(path) as store:
        (talk,) = store.conversations()
        _, answer = store.branch(talk.id)
    assert (answer.content, answer.reasoning, answer.state) == ("word " * 49, "hm", "writing")


def test_two_programs_write_to_one_file_without_losing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for timeout in ("OPEN_TIMEOUT_S", "BUSY_TIMEOUT_S"):  # locks have no queue: who is unlucky waits for all others
        monkeypatch.setattr(database, timeout, 300.0)
    path = tmp_path / "c.sqlite3"
    talk_ids = []

    def write(name: str) -> None:
        with ConversationStore.open(path) as store:
            talk = store.create(name).id
            talk_ids.append(talk)
            exchange(store, talk, None, *(f"{name} {n}" for n in range(30)))

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ConversationStore.open(path) as store:
        assert sorted(len(store.branch(talk)) for talk in talk_ids) == [30, 30, 30]


def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "c.sqlite3"
    with ConversationStore.open(path) as store:
        store.create("secret")
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {0o600}


def fill(path: Path, n: int = 400) -> None:
    with ConversationStore.open(path) as store:
        talk = store.create("long talk").id
        exchange(store, talk, None, *(f"message {i} " + "x" * 300 for i in range(n)))


def test_a_damaged_file_is_refused_and_salvage_rescues_the_rest_and_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    fill(path)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 & ~4095
    data[middle : middle + 2 * 4096] = os.urandom(2 * 4096)
    path.write_bytes(data)
    with pytest.raises(DamagedConversationsError) as caught:
        ConversationStore.open(path)
    assert str(path) in str(caught.value)
    result = salvage(path)
    assert result.damaged.read_bytes() == bytes(data)
    assert 300 < result.n_messages < 400
    with ConversationStore.open(path) as store:
        (talk,) = store.conversations()
        texts = {store.message(i).content for ids in store.children(talk.id).values() for i in ids}
        assert len(texts) == result.n_messages
        assert all(text.endswith("x" * 300) for text in texts)
        assert store.branch(talk.id)  # there is something on view


def test_a_file_of_garbage_is_refused_and_salvage_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    path.write_bytes(b"not a database at all" * 500)
    with pytest.raises(DamagedConversationsError):
        ConversationStore.open(path)
    result = salvage(path)
    assert (result.n_conversations, result.n_messages) == (0, 0)
    assert result.damaged.read_bytes().startswith(b"not a database")
    with ConversationStore.open(path) as store:
        assert store.conversations() == []


def test_damage_found_later_is_reported_as_such(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    fill(path)
    with ConversationStore.open(path) as store:
        talk = store.conversations()[0].id
        data = bytearray(path.read_bytes())
        data[8192:] = bytes(len(data) - 8192)
        path.write_bytes(data)
        with pytest.raises(DamagedConversationsError):
            store.search("message", conversation_id=talk)


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    fill(path, 2)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConversationError, match="newer localrun"):
        ConversationStore.open(path)


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(ConversationError, match="not a localrun database"):
        ConversationStore.open(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


def test_a_folder_that_cannot_exist_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversationError) as caught:
        ConversationStore.open(tmp_path / "file" / "c.sqlite3")
    assert caught.value.hint is not None
    assert "LOCALRUN_DATA_DIR" in caught.value.hint


def test_default_place_is_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_DATA_DIR", str(tmp_path / "data"))
    with ConversationStore.open() as store:
        assert store.path.parent == tmp_path / "data"


def test_in_memory_store_has_search_too() -> None:
    with ConversationStore.in_memory() as store:
        talk = store.create("t").id
        exchange(store, talk, None, "find me")
        assert len(store.search("find")) == 1


def test_half_a_surrogate_pair_does_not_stop_the_saving(store: ConversationStore) -> None:
    talk = store.create().id
    store.add(talk, None, "user", "file \udc80 name")
    assert texts_on_view(store, talk) == ["file ? name"]


def test_two_thousand_messages_are_read_in_order(store: ConversationStore) -> None:
    talk = store.create().id
    exchange(store, talk, None, *(str(n) for n in range(2000)))
    assert texts_on_view(store, talk) == [str(n) for n in range(2000)]


def test_recent_user_texts_are_distinct_and_oldest_first(store: ConversationStore) -> None:
    talk = store.create().id
    exchange(store, talk, None, "one", "a", "two", "a", "one", "a")
    assert store.recent_user_texts() == ["two", "one"]
    assert store.recent_user_texts(1) == ["one"]


def test_state_values_are_kept(store: ConversationStore) -> None:
    assert store.get_state("theme", "default") == "default"
    store.set_state("theme", {"name": "nord"})
    assert store.get_state("theme") == {"name": "nord"}


# --- export


def test_markdown_export_shows_the_branch_on_view_with_reasoning_attachments_and_endings(
    store: ConversationStore,
) -> None:
    talk = store.create("My talk", {"system": "Be brief."}).id
    question = store.add(talk, None, "user", "q", attachments=[Attachment("f.md", "```py\nx\n```", 1)])
    store.add(talk, question.id, "assistant", "unseen")
    store.add(talk, question.id, "assistant", "answer", reasoning="because", state="stopped")
    text = export_markdown(store, talk)
    assert text.startswith("# My talk\n")
    assert "Be brief." in text
    assert "````\n```py\nx\n```\n````" in text
    assert "because" in text
    assert "answer\n\n*(stopped by the user)*" in text
    assert "unseen" not in text


def test_json_export_holds_all_branches(store: ConversationStore) -> None:
    talk = store.create("t").id
    question, first = exchange(store, talk, None, "q", "first")
    second = store.add(talk, question, "assistant", "second", reasoning="r").id
    body = json.loads(export_json(store, talk))
    assert body["head"] == second
    assert [(m["id"], m["parent"]) for m in body["messages"]] == [
        (question, None),
        (first, question),
        (second, question),
    ]
    assert body["messages"][2]["reasoning_content"] == "r"


def test_export_never_replaces_a_file(store: ConversationStore, tmp_path: Path) -> None:
    talk = store.create("Über: a/../b").id
    folder = tmp_path / "out"
    folder.mkdir()
    first, second = write_export(store, talk, "md", folder), write_export(store, talk, "md", folder)
    assert (first.name, second.name) == ("über-a-b.md", "über-a-b-2.md")
    with pytest.raises(ConversationError, match="already"):
        write_export(store, talk, "json", first)
    with pytest.raises(ConversationError, match="can't be written"):
        write_export(store, talk, "json", tmp_path / "no" / "such" / "f.json")
    assert sorted(path.name for path in folder.iterdir()) == ["über-a-b-2.md", "über-a-b.md"]


def test_slug_of_a_title_without_letters_is_a_name() -> None:
    assert slug("../..") == "conversation"


# --- on a thread of its own


def test_the_store_thread_does_all_in_order_and_what_is_awaited_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    thread = StoreThread(lambda: ConversationStore.open(path))
    assert thread.open().result(300) == path
    talk = thread.submit(lambda store: store.create("t").id).result(300)

    def add(number: int) -> Callable[[ConversationStore], Message]:
        return lambda store: store.add(talk, None, "user", str(number))

    pending = [thread.submit(add(n)) for n in range(50)]
    pending[-1].result(300)
    with ConversationStore.open(path) as other:
        assert [other.message(m.result().id).content for m in pending] == [str(n) for n in range(50)]
    assert thread.close(300)


def test_errors_of_the_store_reach_whoever_waits_and_the_thread_goes_on(tmp_path: Path) -> None:
    thread = StoreThread(lambda: ConversationStore.open(tmp_path / "c.sqlite3"))
    with pytest.raises(ConversationError, match="not open"):
        thread.submit(ConversationStore.conversations).result(300)
    thread.open().result(300)
    with pytest.raises(KeyError):
        thread.submit(lambda store: store.message(99)).result(300)
    given_up = thread.submit(lambda store: store.create("made all the same"))
    given_up.cancel()
    assert [c.title for c in thread.submit(ConversationStore.conversations).result(300)] == ["made all the same"]
    assert thread.close(300)


def test_a_file_that_another_program_holds_is_said_and_closing_does_not_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite3"
    thread = StoreThread(lambda: ConversationStore.open(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ConversationError, match="in use by another program") as caught:
        thread.open().result(300)
    assert "close it" in str(caught.value.hint)
    other.execute("COMMIT")
    other.close()
    thread.open().result(300)  # trying again is enough

    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = thread.submit(lambda store: store.create("waits"))
    assert not thread.close(0.05), "the deadline counts, not the lock"
    holder.execute("COMMIT")
    assert waiting.result(300).title == "waits", "and what was asked for is done as soon as it can be"
    holder.close()


KILLED = """
import os, sys
from pathlib import Path
from localrun.engine.conversations import ConversationStore, StoreThread
thread = StoreThread(lambda: ConversationStore.open(Path(sys.argv[1])))
thread.open().result()
talk = thread.submit(lambda store: store.create("t").id).result()
for n in range(100000):
    thread.submit(lambda store, n=n: store.add(talk, store.conversation(talk).head, "user", str(n))).result()
    print(n, flush=True)
"""


@pytest.mark.parametrize("n_lines", [1, 7, 40])
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path, n_lines: int) -> None:
    path = tmp_path / "c.sqlite3"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(n_lines)]
    process.kill()
    told += process.stdout.read().splitlines()
    process.wait()
    n_told = len([line for line in told if line.strip().isdigit()])
    with ConversationStore.open(path) as store:
        kept = [message.content for message in store.branch(store.conversations()[0].id)]
    assert kept == [str(n) for n in range(len(kept))]
    assert n_told <= len(kept) <= n_told + 1


@pytest.mark.parametrize(
    ("damage", "n_rescued"),
    [
        ("UPDATE messages SET details = '[]' WHERE id = 2", 2),
        ("UPDATE messages SET details = 'x' WHERE id = 2", 2),
        ("UPDATE messages SET details = '{\"attachments\": [{}]}' WHERE id = 2", 2),
        ("UPDATE messages SET content = x'41' WHERE id = 2", 2),
        ("UPDATE messages SET content = CAST(x'ff41' AS TEXT) WHERE id = 2", 2),
        ("UPDATE messages SET role = 'nobody' WHERE id = 2", 2),
        ("UPDATE messages SET parent_id = 2 WHERE id = 2", 3),
        ("UPDATE messages SET parent_id = 3 WHERE id = 2", 3),
        ("UPDATE conversations SET settings = 'null'", 3),
    ],
)
def test_rows_that_nobody_wrote_are_damage_and_rescued_around(tmp_path: Path, damage: str, n_rescued: int) -> None:
    path = tmp_path / "c.sqlite3"
    with ConversationStore.open(path) as store:
        talk = store.create("t").id
        first = store.add(talk, None, "user", "one")
        second = store.add(talk, first.id, "assistant", "two")
        store.add(talk, second.id, "user", "three")
    with sqlite3.connect(path) as db:
        db.execute(damage)
    db.close()
    with ConversationStore.open(path) as store, pytest.raises(DamagedConversationsError):
        assert store.conversations() == store.branch(talk)
    rescued = salvage(path)
    assert rescued.n_messages == n_rescued
    with ConversationStore.open(path) as store:
        (conversation,) = store.conversations()
        assert store.branch(conversation.id)[-1].content == "three"


def test_a_message_of_sqlite_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """A damaged schema is quoted in the error's text, and Python can't decode it."""
    path = tmp_path / "c.sqlite3"
    with ConversationStore.open(path) as store:
        store.create("t")
    data = path.read_bytes()
    at = data.rindex(b"CREATE TABLE messages")
    path.write_bytes(data[:at] + b"D\xff\xff" + data[at + 3 :])
    with pytest.raises(DamagedConversationsError):
        ConversationStore.open(path)


def test_pages_that_refer_to_each_other_in_a_circle_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from localrun.engine.conversations import damaged

    class Circle:
        """Answers as SQLite does where a page's last pointer leads back to it."""

        def execute(self, statement: str, values: tuple[int]) -> list[tuple[int, str]]:
            return [(id, "row") for id in (1, 2, 3, 1, 2, 3) if id > values[0]] if values[0] < 3 else []

    rows = list(damaged._readable_rows(Circle(), "messages", "id"))  # type: ignore[arg-type]
    assert [row[0] for row in rows] == [1, 2, 3]
