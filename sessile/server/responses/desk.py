"""The desk: takes responses in, runs them as turns of branching sessions, and keeps what clients want kept."""

import asyncio
import contextlib
import logging
import uuid
from functools import partial

import orjson

from sessile.contract.messages import Sampling
from sessile.errors import InvalidRequest, LimitReached, NotFound, TooLong, UserError
from sessile.server.calls import DISCONNECTED, Call, Order, Service
from sessile.server.dialogues import Dialogue, Place
from sessile.server.encoding import Rendering
from sessile.server.keys import Caller
from sessile.server.openai_replies import Choice
from sessile.server.responses.bodies import ResponseBody
from sessile.server.responses.items import Item, check_once, check_outputs, is_reference, items_of
from sessile.server.responses.kept_items import KeptItems
from sessile.server.responses.record import Conversation, Line, ResponseRecord, ids_of
from sessile.server.responses.shelf import Shelf
from sessile.server.sampling import to_sampling
from sessile.server.tools import AnswerReading, reading_of
from sessile.text.template import Message

log = logging.getLogger(__name__)


class ConversationLocked(InvalidRequest):
    """A response of this conversation is in flight."""

    code = "conversation_locked"


class Desk:
    """Responses and conversations of all tenants. Its only user is the event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        options = service.options
        bounds = {
            "count_max": options.responses_max,
            "bytes_max": options.responses_bytes_max,
            "idle_s": options.dialogue_idle_timeout_s,
        }
        self.responses: Shelf[ResponseRecord] = Shelf(**bounds, let_go=self._let_go)  # type: ignore[arg-type]
        self.conversations: Shelf[Conversation] = Shelf(**bounds, let_go=self._let_conversation_go)  # type: ignore[arg-type]
        self._kept_items = KeptItems()
        self._background: set[asyncio.Task[None]] = set()

    # -- what clients have ----------------------------------------------------------------------------------------

    def response(self, tenant: str, response_id: str, param: str | None = None) -> ResponseRecord:
        """A tenant's stored response. Raises NotFound."""
        record = self.responses.find(tenant, response_id)
        if record is None:
            raise NotFound(f"there is no response {response_id!r}: it was not stored, or forgotten", param=param)
        return record

    def conversation(self, tenant: str, conversation_id: str, param: str | None = None) -> Conversation:
        """A tenant's conversation. Raises NotFound."""
        conversation = self.conversations.find(tenant, conversation_id)
        if conversation is None:
            raise NotFound(f"there is no conversation {conversation_id!r}", param=param)
        return conversation

    def items_of(self, tenant: str, given: object, field: str, before: Line | None = None) -> list[Item]:
        """Checked items of a tenant's, which are to stand behind others. Raises UserError naming what is wrong.

        Those that are referred to may be no more bytes than could be sent.
        """
        self.responses.expire()
        self.conversations.expire()
        items = items_of(given, field, partial(self._kept_items.find, tenant))
        check_once(items, field, before.all_ids() if before else ())
        told = given if isinstance(given, list) else [given]
        referred_to = [item for item, each in zip(items, told, strict=True) if is_reference(each)]
        bytes_max = self._service.options.body_bytes_max
        if sum([len(orjson.dumps(item)) for item in referred_to]) > bytes_max:
            raise TooLong(f"{field}: the items that it refers to have more than {bytes_max} bytes", param=field)
        check_outputs(items, field, before.all() if before else ())
        return items

    def put(self, conversation: Conversation) -> None:
        """Keep a new conversation."""
        conversation.size_bytes = conversation.measured_bytes()
        self._kept_items.assign(conversation, conversation.items)
        self.conversations.put(conversation)

    def note_change(self, conversation: Conversation) -> None:
        """A conversation that is kept has other items, or other metadata, than before."""
        self._kept_items.assign(conversation, conversation.items)
        self.conversations.resize(conversation, conversation.measured_bytes())

    async def cancel(self, record: ResponseRecord) -> None:
        """End a response that is in flight, and wait for its end. Raises InvalidRequest if it has ended."""
        if record.status != "in_progress":
            raise InvalidRequest(f"response {record.id!r} is {record.status}: there is nothing to cancel")
        self._service.abort(record.tenant, record.id)
        await record.ended.wait()

    def delete(self, record: ResponseRecord) -> None:
        """Forget a response; one in flight is ended. What went on from it stays."""
        self.responses.remove(record)
        if record.status == "in_progress":
            self._service.abort(record.tenant, record.id)

    def _let_go(self, record: ResponseRecord) -> None:
        record.is_stored = False
        self._kept_items.assign(record, ())
        if record.dialogue is not None and record.turn is not None:
            self._service.dialogues.drop(record.dialogue, record.turn)
        record.turn = None

    def _let_conversation_go(self, conversation: Conversation) -> None:
        conversation.is_kept = False
        self._kept_items.assign(conversation, ())
        if conversation.dialogue is not None and not conversation.is_busy:
            self._service.dialogues.close(conversation.dialogue)

    # -- a response, from its body to its end ---------------------------------------------------------------------

    async def begin(self, caller: Caller, body: ResponseBody) -> "tuple[ResponseRecord, Choice]":
        """A response that is ready to be sent to the engine. Raises UserError, with nothing changed."""
        service = self._service
        previous, conversation = self._origin(caller, body)
        before = previous.line if previous else conversation.line if conversation else None
        items = self.items_of(caller.tenant, body.input, "input", before)
        record = ResponseRecord(
            id=f"resp_{uuid.uuid4().hex}",
            tenant=caller.tenant,
            body=body,
            input_items=items,
            line=Line.of(before, items),
            model=service.model_name,
        )
        sampling = to_sampling(
            body,
            max_new_tokens=body.max_output_tokens,
            min_new_tokens=body.min_tokens,
            vocab_size=service.link.ready.vocab_size,
        )
        self._reading(body, "")  # what it refuses is refused before anything is taken
        # Instructions and tools are those of this response alone: with others, the prompt is another one from its
        # beginning.
        instructions = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
        messages = [*instructions, *record.line.all()]
        tools = body.tool_use.tools
        rendering = Rendering(service.tokenizer, tools=tools)
        with contextlib.ExitStack() as undoing:
            if conversation is not None and body.store is not False:
                if conversation.is_busy:
                    raise ConversationLocked(
                        f"conversation {conversation.id!r} has a response in flight: wait for it", param="conversation"
                    )
                conversation.is_busy = True
                undoing.callback(self._leave, conversation, record, None)
            record.dialogue = await self._dialogue(record, previous, conversation)
            place = await service.dialogues.place(
                record.dialogue, messages, rendering, beside=tools or None, at=previous.turn if previous else None
            )
            undoing.callback(service.dialogues.give_back, place)
            choice = self._choice(record, place, sampling, self._reading(body, rendering.prompt))
            choice.call.at_end = lambda: self._end(record, place, choice, conversation)
            undoing.pop_all()  # from here on it is the call's end that does this
        return record, choice

    def _reading(self, body: ResponseBody, prompt: str) -> AnswerReading:
        """How the answer to a prompt is read. Raises InvalidRequest for what cannot be asked of this model."""
        service = self._service
        return reading_of(
            service.options,
            service.tokenizer,
            body.tool_use,
            prompt,
            asked=body.grammar,
            skips_special=body.skip_special_tokens,
        )

    def _choice(self, record: ResponseRecord, place: Place, sampling: Sampling, reading: AnswerReading) -> Choice:
        """The answer at a place, not sent yet."""
        service, body = self._service, record.body
        record.dialogue = place.dialogue
        order = Order(
            tokens=place.tokens,
            input_field="input",
            sampling=sampling,
            tenant=record.tenant,
            priority=body.priority or 0,
            rid=record.id,
            rid_drawn=True,
            session=place.dialogue.session if place.dialogue else None,
            branch=place.branch,
            **body.wish,
        )
        call = Call(service, reading.of(order), whole=not body.stream)
        if body.store is not False:
            record.is_stored = True
            record.size_bytes = record.measured_bytes()
            # Only then: the response that this one goes on from may have to leave the shelf for it.
            call.at_start = lambda: self._store(record)
        return Choice(0, call, service.tokenizer, trim_stop=not body.no_stop_trim, reader=reading.reader())

    def _store(self, record: ResponseRecord) -> None:
        self._kept_items.assign(record, record.input_items)
        self.responses.put(record)

    def run_in_background(self, record: ResponseRecord, choice: Choice) -> None:
        """Send a response to the engine and let it run, whoever waits for it. Raises UserError if it cannot be sent."""
        running = contextlib.ExitStack()
        running.enter_context(choice.call)
        record.is_known = True

        async def run() -> None:
            try:
                with running:
                    choice.add(await choice.call.next())
            except UserError as error:
                record.note_failure(error)
            record.ended.set()

        task = asyncio.get_running_loop().create_task(run())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _origin(self, caller: Caller, body: ResponseBody) -> tuple[ResponseRecord | None, Conversation | None]:
        """What a response goes on from. Raises UserError if it cannot be gone on from."""
        if body.previous_response_id is not None:
            param = "previous_response_id"
            previous = self.response(caller.tenant, body.previous_response_id, param)
            if not previous.can_be_gone_on_from:
                raise InvalidRequest(f"response {previous.id!r} is {previous.status}: it has no answer", param=param)
            return previous, None
        if body.conversation_id is not None:
            return None, self.conversation(caller.tenant, body.conversation_id, "conversation")
        return None, None

    async def _dialogue(
        self, record: ResponseRecord, previous: ResponseRecord | None, conversation: Conversation | None
    ) -> Dialogue | None:
        """Whose turn the response is; a new dialogue if there is none and its turn is to be kept."""
        origin = previous or conversation
        known = origin.dialogue if origin else None
        if known is not None and known.is_open:
            return known
        if record.body.store is False:
            return None
        if conversation is None:
            return await self._fresh(record.tenant, record.id)
        # One response of a conversation at a time comes here. A session that was closed may take a while to be gone,
        # so the next one has another name.
        name = conversation.id if known is None else f"{conversation.id}.{record.id[-8:]}"
        conversation.dialogue = await self._fresh(conversation.tenant, name)
        return conversation.dialogue

    async def _fresh(self, tenant: str, name: str) -> Dialogue | None:
        """A new dialogue; None where the tenant has as many sessions as it may: then all messages are sent."""
        try:
            return await self._service.dialogues.fresh(tenant, name)
        except UserError as error:
            if error.status != LimitReached.status:
                raise
            return None

    def _end(self, record: ResponseRecord, place: Place, choice: Choice, conversation: Conversation | None) -> None:
        """The call was left: what is to stay stays, and whoever waits is told."""
        done = choice.call.done
        is_gone = done is None or done.message == DISCONNECTED
        record.output.take(choice)  # what a stream was not told of, or nobody was
        record.output.close("incomplete")
        record.note_end(done, choice.reasoning_tokens)
        wanted = record.is_stored and not is_gone
        turn = self._service.dialogues.end(place, choice.call, choice.message, keep=wanted)
        line = Line(record.line, (choice.message,), ids_of(record.output.items))
        if conversation is not None and record.body.store is not False:
            self._leave(conversation, record, line if wanted and record.can_be_gone_on_from else None)
        if is_gone or not (record.can_be_gone_on_from or record.is_known):
            self.responses.remove(record)  # Nobody has seen its id, or nobody waited for its answer.
        elif record.is_stored:
            record.turn, record.line = turn, line
            self._kept_items.assign(record, [*record.input_items, *record.output.items])
            self.responses.resize(record, record.measured_bytes())
        record.ended.set()

    def _leave(self, conversation: Conversation, record: ResponseRecord, line: Line | None) -> None:
        """A conversation's response has ended. line: all messages up to its answer, if that counts."""
        conversation.is_busy = False
        if not conversation.is_kept:
            self._let_conversation_go(conversation)
        elif line is not None:
            # What its input refers to may have been put into the conversation since it began.
            known = set(ids_of(conversation.items))
            said = [item for item in (*record.input_items, *record.output.items) if item["id"] not in known]
            conversation.add(said, line if record.line.before is conversation.line else None)
            self.note_change(conversation)
