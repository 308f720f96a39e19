"""What is mutated: for each kind of file a valid one, and what localrun makes of it.

`look` opens a file the way localrun does and gives everything that it says, as a digest; two lookings are the same if whoever uses
the result can't tell them apart. Errors are localrun's own, or the file has been misunderstood.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from gguf import GGMLQuantizationType as QT

from localrun.engine.conversations import ConversationStore, DamagedConversationsError, salvage
from localrun.engine.conversations.importing import import_conversations, read_conversations
from localrun.errors import LocalrunError
from localrun.offload.cache.profile import RoutingProfile
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.convert.integrity import verify
from localrun.quant.convert.overlay import write_overlay
from localrun.quant.gguf.file import read_gguf
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from localrun.quant.precision.copies import BetterCopies
from tools.reliability import mutations

Damage = Callable[[random.Random, bytes], tuple[bytes, str]]


@dataclass(frozen=True, slots=True)
class Look:
    """What a file was found to hold.

    Attributes:
        digest: of all that it says.
        ignored: it was passed over, as a cache that can be made again may be.
        found: damage was reported: `verify`, or a database that was rescued.
        payload: digest of the weights alone.
    """

    digest: str
    ignored: bool = False
    found: bool = False
    payload: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of file in a folder of its own.

    Attributes:
        path: the file that is mutated.
        open: what is opened: the file or its folder.
        damage: mutates its bytes.
        look: see the module.
        checked: checksums cover every byte of the weights, so none may change unnoticed.
        model: can be loaded and asked.
        close: frees what `look` uses.
    """

    name: str
    path: Path
    open: Path
    damage: Damage
    look: Callable[[Path], Look]
    checked: bool = False
    model: bool = False
    close: Callable[[], None] = lambda: None


def make(name: str, folder: Path) -> Kind:
    """The kind with its valid files in `folder`."""
    return _MAKERS[name](folder)


def _digest(*parts: Any) -> str:
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace"))
        hasher.update(b"\0")
    return str(hasher.hexdigest())


def _look_at_model(path: Path) -> Look:
    """Headers, extents and all bytes that they point to."""
    source = open_model(path)
    said, payload = _contents(source)
    return Look(_digest(said, payload), payload=payload)


def _contents(source: ModelSource) -> tuple[str, str]:
    """(digest of what is said about the weights, digest of the weights)."""
    files = [file.read_bytes() for file in source.files]
    weights = []
    for layer, shape in source.moe_layers.items():
        for expert in range(shape.n_experts):
            for recipe in (source.base_expert, source.expert):
                for projection in recipe(layer, expert):
                    for extent in projection.extents:
                        end = extent.offset + extent.n_bytes
                        assert 0 <= extent.offset < end <= len(files[extent.file])
                        weights.append(files[extent.file][extent.offset : end])
    dense = [source.read_tensor(name).tobytes() for name in sorted(source.tensors) if "_exps." not in name]
    infos = [(name, source.tensors[name].shape, source.tensors[name].type) for name in sorted(source.tensors)]
    return _digest(source.gguf_header(), infos, dict(source.moe_layers)), _digest(*weights, *dense)


def _look_at_converted(path: Path) -> Look:
    source = GgufSource.open(path)
    said, payload = _contents(source)
    manifest = source.manifest
    found = manifest is None or bool(verify(source, manifest))
    free: list[object] = []
    if manifest is not None:
        free = [
            manifest.source,
            manifest.tools,
            manifest.options,
            manifest.profile,
            manifest.better_copies,
            manifest.report,
        ]
        free.append(manifest.overlay.options if manifest.overlay is not None else None)
    return Look(_digest(said, payload, free), found=found, payload=payload)


def _gguf(folder: Path) -> Kind:
    from tests.gguf_models import SMALLEST, write_deepseek4

    (path,) = write_deepseek4(folder / "model.gguf", SMALLEST)
    header = read_gguf(path).data_offset
    return Kind(
        "gguf", path, path, lambda rng, data: mutations.damage_bytes(rng, data, header), _look_at_model, model=True
    )


def _checkpoint(folder: Path, name: str) -> Kind:
    from tests.checkpoints import write_small
    from tests.quant.checkpoint.test_tokenizer_json import small_tokenizer, v4_pre_tokenizer

    single = name != "index"
    write_small(folder, single_file=single, vocab_size=500, n_routed_experts=2)
    (folder / "tokenizer.json").write_text(json.dumps(small_tokenizer(v4_pre_tokenizer(), vocab_size=400)))
    file = {
        "safetensors": "model.safetensors",
        "config": "config.json",
        "index": "model.safetensors.index.json",
        "tokenizer": "tokenizer.json",
    }[name]
    damage = mutations.damage_safetensors if name == "safetensors" else mutations.damage_json
    return Kind(name, folder / file, folder, damage, _look_at_model, model=True)


def _converted(folder: Path, name: str) -> Kind:
    from tests.checkpoints import write_small

    source = write_small(
        folder.with_name(f"{folder.name}-source"), n_routed_experts=4, hidden_size=256, moe_intermediate_size=256
    )
    convert(source, folder, jobs=1)
    write_overlay(Checkpoint.open(source), BetterCopies({0: {3: QT.BF16, 1: QT.BF16}, 2: {0: QT.Q8_0}}), folder, jobs=1)
    shutil.rmtree(source)
    if name == "manifest":
        return Kind(
            name,
            folder / MANIFEST_NAME,
            folder,
            mutations.damage_json,
            _look_at_converted,
            checked=True,
            model=True,
        )
    (overlay,) = folder.glob("overlay-*.gguf")
    path = overlay if name == "overlay" else folder / MODEL_NAME
    header = read_gguf(path).data_offset
    return Kind(
        name,
        path,
        folder,
        lambda rng, data: mutations.damage_bytes(rng, data, header),
        _look_at_converted,
        checked=True,
        model=True,
    )


def _profile(folder: Path) -> Kind:
    import numpy as np

    shapes = {0: 8, 1: 8, 2: 8}
    profile = RoutingProfile("identity", shapes)
    rng = np.random.default_rng(0)
    for layer in shapes:
        experts = np.sort(rng.choice(8, 5, replace=False)).astype(np.int32)
        profile.record(layer, experts, np.arange(6, dtype=np.int32), 5)
    path = folder / "model.profile"
    profile.save(path)

    def look(path: Path) -> Look:
        loaded = RoutingProfile.load("identity", shapes, path=path)
        return Look(_digest(loaded.clock, loaded.ranking()), ignored=loaded.is_empty)

    return Kind("profile", path, path, lambda rng, data: mutations.damage_bytes(rng, data, 100), look, checked=True)


def _said(store: ConversationStore) -> list[Any]:
    """All that a store says."""
    said: list[Any] = []
    for conversation in store.conversations():
        said.append((conversation.title, conversation.settings, conversation.head))
        said += [
            (message.role, message.content, message.reasoning, message.state, message.details)
            for message in store.branch(conversation.id)
        ]
        said.append(sorted(store.children(conversation.id).items(), key=repr))
    said.append([hit.message_id for hit in store.search("sea")])
    return [*said, store.recent_user_texts()]


def _conversations(folder: Path) -> Kind:
    path = folder / "conversations.sqlite3"
    with ConversationStore.open(path) as store:
        _fill(store)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)

    def look(path: Path) -> Look:
        try:
            with ConversationStore.open(path) as store:
                return Look(_digest(_said(store)))
        except DamagedConversationsError:
            rescued = salvage(path)
            for aside in path.parent.glob(f"{rescued.damaged.name}*"):
                aside.unlink()
            with ConversationStore.open(path) as store:
                return Look(_digest(_said(store)), found=True)

    return Kind("conversations", path, path, lambda rng, data: mutations.damage_bytes(rng, data, len(data)), look)


def _fill(store: ConversationStore) -> None:
    for number in range(4):
        conversation = store.create(f"Talk {number}", {"system": "Be kind."})
        parent = None
        for turn in range(3):
            asked = store.add(conversation.id, parent, "user", f"Question {turn} about the sea? " * 20)
            answer = store.add(conversation.id, asked.id, "assistant", "It is blue. " * 100, reasoning="Hm. " * 30)
            parent = answer.id
        store.add(conversation.id, None, "user", "Another beginning")


def _jsonl(folder: Path) -> Kind:
    lines = []
    for number in range(6):
        role = ("user", "assistant")[number % 2]
        lines.append({"role": role, "content": f"Text {number} of a talk, with “quotes” and \U0001f40b.", "n": number})
    path = folder / "talk.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))

    def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
        if rng.random() < 0.5:
            return mutations.damage_bytes(rng, data, len(data))
        parts = data.split(b"\n")
        at = rng.randrange(len(parts))
        parts[at], name = mutations.damage_json(rng, parts[at])
        return b"\n".join(parts), name

    def look(path: Path) -> Look:
        found = read_conversations(path)
        with ConversationStore.in_memory() as store:
            import_conversations(store, found)
            return Look(_digest(_said(store)))

    return Kind("jsonl", path, path, damage, look)


def _snapshot(folder: Path, name: str, *, large: bool) -> Kind:
    """A session's state, in memory or, if it is large, as a file."""
    from localrun.engine.engine import Engine
    from localrun.engine.options import EngineOptions
    from localrun.engine.snapshots import SnapshotStore
    from tests.engine.models import write_chat_model

    model = write_chat_model(folder / "chat.gguf")
    engine = Engine.open(model, EngineOptions(n_ctx=256, n_batch=32, n_threads=1, ram_bytes=64 << 20), learn=False)
    session, prompt = engine.session(), list(range(2, 22))
    session.feed(prompt)
    with_store, memory_bytes = folder / "states", 0 if large else 1 << 30
    store = SnapshotStore(with_store, "key")
    if large:
        store.put_file(prompt, 1 << 20, session.write)
    else:
        store.put(prompt, bytes(session.snapshot()))
    store.close()
    (path,) = with_store.glob("*/*.snapshot")

    def look(path: Path) -> Look:
        found = SnapshotStore(with_store, "key", memory_bytes=memory_bytes).longest_prefix([*prompt, 30])
        if found is None:
            return Look("", ignored=True)
        session.reset()
        try:
            session.restore(found[1])
        except LocalrunError as error:
            error.args = (f"{path}: {error}",)  # bytes have no name: whoever read them from a file knows it
            raise
        finally:
            path.parent.mkdir(exist_ok=True)
        return Look(_digest(list(session.tokens), bytes(session.snapshot())))

    def close() -> None:
        session.close()
        engine.close()

    return Kind(
        name,
        path,
        path,
        lambda rng, data: mutations.damage_bytes(rng, data, 512),
        look,
        checked=True,
        close=close,
    )


_MAKERS: dict[str, Callable[[Path], Kind]] = {
    "gguf": _gguf,
    "safetensors": lambda folder: _checkpoint(folder, "safetensors"),
    "config": lambda folder: _checkpoint(folder, "config"),
    "index": lambda folder: _checkpoint(folder, "index"),
    "tokenizer": lambda folder: _checkpoint(folder, "tokenizer"),
    "converted": lambda folder: _converted(folder, "converted"),
    "manifest": lambda folder: _converted(folder, "manifest"),
    "overlay": lambda folder: _converted(folder, "overlay"),
    "snapshot": lambda folder: _snapshot(folder, "snapshot", large=False),
    "large snapshot": lambda folder: _snapshot(folder, "large snapshot", large=True),
    "profile": _profile,
    "conversations": _conversations,
    "jsonl": _jsonl,
}

NAMES = tuple(_MAKERS)
