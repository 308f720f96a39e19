"""Conversations of other programs arrive with their branches, and a file that is none changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localrun.engine.conversations import ConversationError, ConversationStore
from localrun.engine.conversations.export import export_json
from localrun.engine.conversations.importing import import_conversations, read_conversations

CHATGPT = {
    "title": "Tea",
    "current_node": "a2",
    "mapping": {
        "a2": {"parent": "q", "message": {"author": {"role": "assistant"}, "content": {"parts": ["second"]}}},
        "root": {"parent": None, "message": None},
        "sys": {"parent": "root", "message": {"author": {"role": "system"}, "content": {"parts": ["Be kind."]}}},
        "q": {
            "parent": "sys",
            "message": {"author": {"role": "user"}, "content": {"parts": ["green", {"image": 1}, "or black?"]}},
        },
        "a1": {"parent": "q", "message": {"author": {"role": "assistant"}, "content": {"parts": ["first"]}}},
        "tool": {"parent": "a1", "message": {"author": {"role": "tool"}, "content": {"result": "x"}}},
        "q2": {"parent": "tool", "message": {"author": {"role": "user"}, "content": {"parts": ["why?"]}}},
    },
}
LLAMA = {
    "conv": {"id": "c", "name": "Maths", "currNode": "3"},
    "messages": [
        {"id": "1", "type": "root", "role": "system", "content": "", "parent": None},
        {"id": "2", "type": "text", "role": "user", "content": "1+1?", "parent": "1"},
        {"id": "3", "type": "text", "role": "assistant", "content": "2", "thinking": "count", "parent": "2"},
        {"id": "4", "type": "text", "role": "assistant", "content": "two", "parent": "2"},
    ],
}


def taken(path: Path, store: ConversationStore) -> list[list[tuple[str, str]]]:
    ids = import_conversations(store, read_conversations(path))
    return [[(m.role, m.content) for m in store.branch(i)] for i in ids]


def test_chatgpt_exports_keep_their_branches_and_pass_over_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "conversations.json").write_text(json.dumps([CHATGPT]))
    with ConversationStore.in_memory() as store:
        assert taken(tmp_path / "conversations.json", store) == [
            [("user", "green\nor black?"), ("assistant", "second")]
        ]
        (talk,) = store.conversations()
        assert (talk.title, talk.settings) == ("Tea", {"system": "Be kind."})
        answers = store.children(talk.id)[store.branch(talk.id)[0].id]
        first = next(i for i in answers if store.message(i).content == "first")
        (why,) = store.children(talk.id)[first]
        assert store.message(why).content == "why?", "what hangs on a tool's message hangs on the answer above"


def test_llama_cpp_exports_are_read_as_one_document_or_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(LLAMA))
    (tmp_path / "many.jsonl").write_text(json.dumps(LLAMA) + "\n" + json.dumps(LLAMA) + "\n")
    with ConversationStore.in_memory() as store:
        assert taken(tmp_path / "one.json", store) == [[("user", "1+1?"), ("assistant", "2")]]
        assert store.branch(1)[1].reasoning == "count"
        assert len(taken(tmp_path / "many.jsonl", store)) == 2


def test_lines_of_messages_are_one_conversation_and_lines_of_conversations_are_many(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello\nthere"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, messages)))
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(3)))
    with ConversationStore.in_memory() as store:
        assert taken(tmp_path / "one.jsonl", store) == [[("user", "Hello\nthere"), ("assistant", "Hi")]]
        assert store.conversations()[0].title == "Hello"
        assert len(taken(tmp_path / "many.jsonl", store)) == 3


def test_our_own_export_comes_back_as_it_was(tmp_path: Path) -> None:
    with ConversationStore.in_memory() as store:
        import_conversations(store, read_conversations(_written(tmp_path / "a.json", CHATGPT)))
        exported = export_json(store, 1)
        (tmp_path / "b.json").write_text(exported)
        taken(tmp_path / "b.json", store)
        again = json.loads(export_json(store, 2))
        before = json.loads(exported)
        assert [m["content"] for m in again["messages"]] == [m["content"] for m in before["messages"]]
        assert again["settings"] == before["settings"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[1]", '{"mapping": 3}', '{"messages": [{"role": 1}]}', "\0", "[" * 5000]
)
def test_what_is_no_export_is_refused_and_changes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConversationError) as caught:
        read_conversations(tmp_path / "x.json")
    assert "x.json" in str(caught.value)
    with pytest.raises(ConversationError, match="can't be read"):
        read_conversations(tmp_path / "missing.json")


def _written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path
