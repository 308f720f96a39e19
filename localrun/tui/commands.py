"""The list of user commands. Key bindings, slash commands, the command palette, the footer, the F1 page and
docs/tui.md all follow it.

Command `name` is handled by the chat screen's method `do_<name>`, whose argument is the text after the slash command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from textual.binding import Binding

from localrun.tui.options import NAMES

Scope = Literal["screen", "message"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCommand:
    """A user command.

    Attributes:
        keys: Textual's key names; the first is the one to show.
        slash: its slash commands; the first is canonical.
        argument: argument of the slash command, as shown in help.
        footer: label in the footer; empty: not shown.
        scope: `message` keys work while a message has the focus; slash and palette then mean the last message.
    """

    name: str
    group: str
    title: str
    help: str
    keys: tuple[str, ...] = ()
    slash: tuple[str, ...] = ()
    argument: str = ""
    footer: str = ""
    scope: Scope = "screen"

    @property
    def key_labels(self) -> str:
        return "  ".join(key_label(key) for key in self.keys)


COMMANDS: tuple[UserCommand, ...] = (
    # --- asking
    UserCommand(
        name="stop",
        group="Asking",
        title="Stop the answer",
        help="Stops at once and keeps what was written. Otherwise closes any open panel and returns to the input.",
        keys=("escape",),
        slash=("stop",),
        footer="Stop",
    ),
    UserCommand(
        name="attach",
        group="Asking",
        title="Attach a text file",
        help="Shows its size in tokens first, and sends it with your next message.",
        keys=("ctrl+o",),
        slash=("attach", "file"),
        argument="PATH",
    ),
    UserCommand(
        name="editor",
        group="Asking",
        title="Write in an editor",
        help="Opens the input in $VISUAL or $EDITOR; what you save becomes the input.",
        keys=("alt+e",),
        slash=("editor",),
    ),
    UserCommand(
        name="think",
        group="Asking",
        title="Switch thinking",
        help="off, high or max; without an argument, the next one.",
        keys=("ctrl+t",),
        slash=("think",),
        argument="off|high|max",
    ),
    UserCommand(
        name="system",
        group="Asking",
        title="Set the system prompt",
        help="For this conversation; without an argument, opens the settings.",
        slash=("system",),
        argument="TEXT",
    ),
    UserCommand(
        name="sampling",
        group="Asking",
        title="Set a sampling value",
        help=f"For example, /set temperature 0.6. NAME is one of {', '.join(NAMES)}.",
        slash=("set",),
        argument="NAME VALUE",
    ),
    UserCommand(
        name="preset",
        group="Asking",
        title="Use or save a preset",
        help="A named system prompt, sampling and thinking for this conversation; without an argument, lists them.",
        slash=("preset",),
        argument="[save|delete] NAME",
    ),
    # --- a message
    UserCommand(
        name="regenerate",
        group="Messages",
        title="Answer again",
        help="Adds a new answer; the old one is kept as a branch.",
        keys=("r", "ctrl+r", "f5"),
        slash=("retry", "regenerate"),
        scope="message",
    ),
    UserCommand(
        name="edit",
        group="Messages",
        title="Edit and ask again",
        help="Puts your message back into the input; sending it starts a new branch and keeps the old one.",
        keys=("e",),
        slash=("edit",),
        scope="message",
    ),
    UserCommand(
        name="fork",
        group="Messages",
        title="Branch from here",
        help="Continues from this message; what followed is kept as a branch.",
        keys=("b",),
        slash=("branch",),
        scope="message",
    ),
    UserCommand(
        name="previous_branch",
        group="Messages",
        title="Previous branch",
        help="The previous version of this message.",
        keys=("left",),
        slash=("prev",),
        scope="message",
    ),
    UserCommand(
        name="next_branch",
        group="Messages",
        title="Next branch",
        help="The next version of this message.",
        keys=("right",),
        slash=("next",),
        scope="message",
    ),
    UserCommand(
        name="undo",
        group="Messages",
        title="Take back the last question",
        help="Puts it back into the input; the question and its answer are kept as a branch.",
        slash=("undo",),
    ),
    UserCommand(
        name="copy",
        group="Messages",
        title="Copy the message",
        help="To the clipboard, through the terminal (OSC 52), so it works over SSH.",
        keys=("c", "f7"),
        slash=("copy",),
        scope="message",
    ),
    UserCommand(
        name="copy_code",
        group="Messages",
        title="Copy a code block",
        help="The last one in the message, or number N.",
        keys=("y", "f8"),
        slash=("code",),
        argument="N",
        scope="message",
    ),
    UserCommand(
        name="toggle_thinking",
        group="Messages",
        title="Fold or unfold the thinking",
        help="In this message.",
        keys=("enter", "space"),
        slash=("fold",),
        scope="message",
    ),
    UserCommand(
        name="to_messages",
        group="Messages",
        title="Switch between messages and input",
        help="The arrow keys move between messages; Esc or Tab returns to the input.",
        keys=("f6",),
        slash=("messages",),
    ),
    # --- conversations
    UserCommand(
        name="new",
        group="Conversations",
        title="New conversation",
        help="The current one is kept.",
        keys=("ctrl+n",),
        slash=("new", "clear"),
        footer="New",
    ),
    UserCommand(
        name="conversations",
        group="Conversations",
        title="Conversations",
        help="Shows or hides the list. Enter opens, r renames and Delete deletes a conversation.",
        keys=("f2",),
        slash=("conversations", "chats"),
        footer="Chats",
    ),
    UserCommand(
        name="find",
        group="Conversations",
        title="Find in this conversation",
        help="Highlights the words. Enter or Up goes to the previous match, Down to the next one; Esc closes.",
        keys=("ctrl+f",),
        slash=("find",),
        argument="WORDS",
    ),
    UserCommand(
        name="search",
        group="Conversations",
        title="Search all conversations",
        help="Including all their branches.",
        keys=("ctrl+g",),
        slash=("search",),
        argument="WORDS",
    ),
    UserCommand(
        name="rename",
        group="Conversations",
        title="Rename the conversation",
        help="Without an argument, asks for the name.",
        slash=("rename", "title"),
        argument="NAME",
    ),
    UserCommand(
        name="delete",
        group="Conversations",
        title="Delete the conversation",
        help="With all its branches, after asking for confirmation.",
        slash=("delete",),
    ),
    UserCommand(
        name="export",
        group="Conversations",
        title="Export the conversation",
        help="Markdown (the current branch) or JSON (all branches). Never overwrites a file.",
        slash=("export",),
        argument="md|json [PATH]",
    ),
    UserCommand(
        name="import_file",
        group="Conversations",
        title="Import conversations",
        help="From JSONL messages, ChatGPT's conversations.json, a llama.cpp export, or /export json.",
        slash=("import",),
        argument="PATH",
    ),
    # --- model
    UserCommand(
        name="models",
        group="Model",
        title="Choose a model",
        help="Lists the models on this machine, and whether they fit; with an argument, loads that path or name.",
        keys=("ctrl+l",),
        slash=("model", "load"),
        argument="PATH",
        footer="Model",
    ),
    UserCommand(
        name="settings",
        group="Model",
        title="Settings",
        help="Sampling, thinking, system prompt, memory and context, theme.",
        keys=("f4",),
        slash=("settings",),
        footer="Set",
    ),
    UserCommand(
        name="engine_panel",
        group="Model",
        title="Engine panel",
        help="Tiers, rates and the expert map. Press again for full screen, and again to close.",
        keys=("f3",),
        slash=("engine", "map", "stats"),
        footer="Engine",
    ),
    UserCommand(
        name="map_view",
        group="Model",
        title="Change what the map shows",
        help="Residency, precision or heat.",
        keys=("f9",),
        slash=("mapview",),
    ),
    UserCommand(
        name="plan",
        group="Model",
        title="Plan",
        help="Where the model's parts are, predicted and measured speed, the bottleneck, and what would help.",
        slash=("plan",),
    ),
    UserCommand(
        name="reload",
        group="Model",
        title="Restart the engine",
        help="Kills its process, whatever it is doing, and reloads the model. The conversation is kept.",
        slash=("reload", "restart"),
    ),
    UserCommand(
        name="convert",
        group="Model",
        title="Convert a checkpoint",
        help="Runs `localrun convert` and shows its progress; you can chat meanwhile.",
        slash=("convert",),
        argument="SRC DST",
    ),
    # --- the program
    UserCommand(
        name="help",
        group="Program",
        title="Help",
        help="This page.",
        keys=("f1",),
        slash=("help",),
        footer="Help",
    ),
    UserCommand(
        name="palette",
        group="Program",
        title="Command palette",
        help="Find any command on this page by name.",
        keys=("ctrl+p",),
        slash=("commands",),
        footer="All",
    ),
    UserCommand(
        name="theme",
        group="Program",
        title="Theme",
        help="Without an argument, shows the list.",
        slash=("theme",),
        argument="NAME",
    ),
    UserCommand(
        name="scroll_up",
        group="Program",
        title="Scroll up",
        help="By one page.",
        keys=("pageup",),
    ),
    UserCommand(
        name="scroll_down",
        group="Program",
        title="Scroll down",
        help="By one page.",
        keys=("pagedown",),
    ),
    UserCommand(
        name="scroll_top",
        group="Program",
        title="Go to the beginning",
        help="Of the conversation.",
        keys=("ctrl+home",),
        slash=("top",),
    ),
    UserCommand(
        name="scroll_end",
        group="Program",
        title="Go to the end",
        help="Of the conversation, and follow the answer as it is written.",
        keys=("ctrl+end",),
        slash=("end",),
    ),
    UserCommand(
        name="interrupt",
        group="Program",
        title="Copy, stop or clear",
        help="Copies the selection if there is one; otherwise stops the answer or clears the input.",
        keys=("ctrl+c",),
    ),
    UserCommand(
        name="quit",
        group="Program",
        title="Quit",
        help="Everything is already saved; the next start opens this conversation.",
        keys=("ctrl+q",),
        slash=("quit", "exit"),
        footer="Quit",
    ),
)

BY_NAME = {command.name: command for command in COMMANDS}
BY_SLASH = {slash: command for command in COMMANDS for slash in command.slash}

INPUT_KEYS: tuple[tuple[str, str], ...] = (
    ("Enter", "Send the message or run the slash command"),
    ("Ctrl+J", "New line. Also \\ then Enter, or Shift+Enter or Alt+Enter if the terminal supports them"),
    ("Up / Down", "On the first or last line: browse earlier messages"),
    ("Tab", "Complete a slash command or file name; otherwise go to the messages"),
    ("@PATH", "Attach a file; matching files are listed as you type"),
    ("/", "List slash commands; // sends text that starts with a slash"),
)
"""Keys of the input itself, for the help page."""

MESSAGE_KEYS: tuple[tuple[str, str], ...] = (
    ("Up / Down", "Previous or next message"),
    ("Home / End", "First or last message"),
)

_LABELS = {
    "escape": "Esc",
    "pageup": "PgUp",
    "pagedown": "PgDn",
    "enter": "Enter",
    "space": "Space",
    "left": "←",
    "right": "→",
    "delete": "Del",
    "home": "Home",
    "end": "End",
    "alt": "Alt",
}


def key_label(key: str) -> str:
    """`ctrl+home` -> `Ctrl+Home`."""
    parts = [_LABELS.get(part, part.upper() if len(part) <= 3 and part[0] == "f" else part) for part in key.split("+")]
    parts = ["Ctrl" if part == "ctrl" else part for part in parts]
    return "+".join(part.upper() if len(parts) > 1 and len(part) == 1 else part for part in parts)


def screen_bindings() -> Iterator[Binding]:
    """Bindings of the chat screen. Single letters and arrows are left to `message_bindings`: they would be typed."""
    for command in COMMANDS:
        keys = [key for key in command.keys if command.scope == "screen" or "+" in key or _is_function_key(key)]
        for number, key in enumerate(keys):
            yield Binding(
                key,
                f"do('{command.name}')",
                command.footer or command.title,
                show=bool(command.footer) and number == 0,
                key_display=key_label(key).replace("Ctrl+", "^"),
                # Before the input, which uses many keys itself. Esc must first reach whatever it closes.
                priority=key != "escape",
            )


def message_bindings() -> Iterator[Binding]:
    """Bindings of one message: keys that only work while it has the focus."""
    for command in COMMANDS:
        if command.scope == "message":
            for key in command.keys:
                if "+" not in key and not _is_function_key(key):
                    yield Binding(key, f"ask('{command.name}')", command.title, show=False)


def groups() -> dict[str, list[UserCommand]]:
    """Commands by group, in the order of the list."""
    result: dict[str, list[UserCommand]] = {}
    for command in COMMANDS:
        result.setdefault(command.group, []).append(command)
    return result


def matching_slashes(typed: str, commands: Iterable[UserCommand] = COMMANDS) -> list[tuple[str, UserCommand]]:
    """Slash commands whose name begins with what was typed, canonical names first."""
    found = [(slash, command) for command in commands for slash in command.slash if slash.startswith(typed)]
    return sorted(found, key=lambda item: (item[1].slash[0] != item[0], item[0]))


def _is_function_key(key: str) -> bool:
    return key[0] == "f" and key[1:].isdigit()
