"""Send one command and learn what became of it, whatever happens to the hub in between."""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator

import msgspec

from trainctl.client.connection import Connection
from trainctl.client.errors import BadRequest, ClientError
from trainctl.client.lines import arguments
from trainctl.client.wire_errors import from_peer
from trainctl.wire import commands, expressions
from trainctl.wire.commands import FINAL_COMMAND_STATES, Action, AddNote, Command
from trainctl.wire.messages import (
    Anomaly,
    CommandQuery,
    CommandReply,
    CommandRequest,
    CommandUpdate,
    Snapshot,
    SnapshotRequest,
)
from trainctl.wire.peer import NoAnswer, Peer, PeerError, Refused

_QUERY_AFTER_S = 2.0
_RETRY_S = 0.5
_TEXT_LENGTH = 2000
_ID_LENGTH = 100
_WORDS_OF_FIELDS = {"id": "command id", "action": "value", "condition": "--if", "expires_s": "--expires"}


def new_command_id() -> str:
    """An id that no other client makes: the time for people, randomness for machines."""
    return f"{time.strftime('%H%M%S')}-{secrets.token_hex(4)}"


def make_command(
    action: Action,
    *,
    condition: str | None = None,
    expires_s: float | None = None,
    revert_after: int | None = None,
    unless: str | None = None,
    command_id: str | None = None,
) -> Command:
    """Build a command and check all of it that can be checked here. Raises `BadRequest`."""
    if problem := commands.check(action):
        raise BadRequest(problem)
    if isinstance(action, AddNote) and not action.text.strip():
        raise BadRequest("the note is empty; nothing was done", "for example: trainctl note 'raised the batch size'")
    for text in (condition, unless):
        if text is not None:
            check_expression(text)
    if unless is not None and revert_after is None:
        raise BadRequest("a condition to keep the change was given, and no time to undo it", "add --revert-after STEPS")
    command = Command(
        id=new_command_id() if command_id is None else command_id,
        action=action,
        condition=condition,
        expires_s=expires_s,
        revert_after=revert_after,
        unless=unless,
    )
    try:
        # Bounds stand in the types and are checked by decoding: the hub's own check, made here before anything is sent.
        return msgspec.msgpack.decode(msgspec.msgpack.encode(command), type=Command)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{commands.spec_of(action).name}: {_in_words(command, error)}; nothing was done") from None
    except OverflowError:
        raise BadRequest(f"{commands.spec_of(action).name}: a number is too large; nothing was done") from None


def _in_words(command: Command, error: msgspec.ValidationError) -> str:
    """What the decoder minds, without its own vocabulary of types and patterns."""
    path = re.search(r"\$\.(action\.)?(\w+)", str(error))
    if path is None:
        return "it cannot be sent like this"
    field = path[2]
    value = getattr(command.action if path[1] else command, field, None)
    name = _WORDS_OF_FIELDS.get(field, field) if not path[1] else field.removesuffix("_s")
    if not isinstance(value, str):
        return f"{name} is {value}, which is out of range"
    if len(value) > _TEXT_LENGTH:
        return f"the {name} has {len(value)} characters: at most {_TEXT_LENGTH} are taken"
    return (
        f"{value[:_ID_LENGTH]!r} is no {name}: use at most {_ID_LENGTH} letters, digits, dots, dashes and underscores, "
        "the first a letter or digit"
    )


def check_expression(text: str) -> expressions.Expression:
    """Parse a condition. Raises `BadRequest`."""
    try:
        return expressions.parse(text)
    except expressions.ExpressionError as error:
        raise BadRequest(str(error), "for example: --if 'loss < 2.3 and step >= 1000'") from None


class Commanding:
    """One command on its way. `updates` yields each state once; the last one is final."""

    def __init__(self, connection: Connection, command: Command, timeout_s: float) -> None:
        self._connection = connection
        self._command = command
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._heard: asyncio.Queue[CommandUpdate | ClientError] = asyncio.Queue()
        self._last: CommandUpdate | None = None

    async def updates(self) -> AsyncGenerator[CommandUpdate, None]:
        """Raises `ClientError` when the command was certainly not taken."""
        sender = asyncio.create_task(self._keep_asking())
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self._loop_deadline()):
                        heard = await self._heard.get()
                except TimeoutError:
                    yield self._unknown(await self._why_it_waits())
                    return
                if isinstance(heard, ClientError):
                    raise heard
                if not self._is_ours(heard):
                    yield self._id_is_taken(heard)
                    return
                if self._last is not None and heard.state == self._last.state:
                    continue
                self._last = heard
                yield heard
                if heard.state in FINAL_COMMAND_STATES:
                    return
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def _is_ours(self, heard: CommandUpdate) -> bool:
        action = self._command.action
        return (heard.command, heard.args) == (commands.spec_of(action).name, commands.args_of(action))

    def _id_is_taken(self, heard: CommandUpdate) -> CommandUpdate:
        """The hub repeats what it knows under an id; when that is something else, ours was not taken."""
        action = self._command.action
        earlier = f"{heard.command} {arguments(heard.args)}".strip()
        return msgspec.structs.replace(
            heard,
            command=commands.spec_of(action).name,
            args=commands.args_of(action),
            state="conflict",
            before=None,
            after=None,
            ranks=None,
            reason=f"command id {heard.id} stands for `{earlier}` ({heard.state}); nothing was done, give another id",
        )

    def _loop_deadline(self) -> float:
        return asyncio.get_running_loop().time() + max(0.0, self._deadline - time.monotonic())

    async def _keep_asking(self) -> None:
        """Send, listen and ask again until cancelled. The same id makes a repeat harmless."""
        sent = False
        while True:
            try:
                async with self._connection.using() as peer:
                    sent = True
                    await self._converse(peer)
            except ClientError as error:
                if not sent:
                    self._heard.put_nowait(error)
                    return
                await asyncio.sleep(_RETRY_S)  # the hub is being started again; its card will show where
            else:
                with contextlib.suppress(ClientError):  # the next round tries again, or the deadline ends it
                    await self._connection.renew(peer)

    async def _converse(self, peer: Peer) -> None:
        """Talk until the hub no longer answers or has forgotten the command."""
        listener = asyncio.create_task(self._listen(peer))
        try:
            while True:
                await asyncio.wait({listener}, timeout=_QUERY_AFTER_S)
                if listener.done():
                    return await listener
                query = CommandQuery(req=0, id=self._command.id)
                try:
                    reply = await peer.ask(query, CommandReply, timeout_s=_QUERY_AFTER_S)
                except Refused:
                    return None  # a hub that does not know it: it gets the command again
                except NoAnswer:
                    return None
                self._heard.put_nowait(reply.update)
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    async def _listen(self, peer: Peer) -> None:
        request = CommandRequest(req=0, command=self._command)
        try:
            async for reply in peer.replies(request, timeout_s=self._timeout_s + _QUERY_AFTER_S):
                if isinstance(reply, CommandReply):
                    self._heard.put_nowait(reply.update)
        except Refused as error:
            self._heard.put_nowait(from_peer(error, self._connection.label))
        except PeerError:
            return  # the conversation is taken up again

    async def _why_it_waits(self) -> str:
        """What the run has said of boundaries that do not come, as far as it is to be had."""
        with contextlib.suppress(ClientError, PeerError):
            async with self._connection.using() as peer:
                picture = await peer.ask(SnapshotRequest(req=0, events=200), Snapshot, timeout_s=_QUERY_AFTER_S)
            for event in reversed(picture.events):
                if isinstance(event, Anomaly) and event.what == "no-step" and event.step == picture.state.step:
                    return f"; {event.text}"
        return ""

    def _unknown(self, why: str) -> CommandUpdate:
        stood = f"it was {self._last.state}{why}" if self._last else f"it was sent and nobody answered{why}"
        return CommandUpdate(
            time=time.time(),
            step=self._last.step if self._last else 0,
            incarnation=self._last.incarnation if self._last else 0,
            id=self._command.id,
            command=commands.spec_of(self._command.action).name,
            args=commands.args_of(self._command.action),
            actor=self._last.actor if self._last else "",
            state="unknown",
            reason=f"no outcome within {self._timeout_s:g} s: {stood}; ask again with --command-id {self._command.id}",
        )
