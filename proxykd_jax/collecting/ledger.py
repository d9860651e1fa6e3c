"""What was sent, paid and answered: files of rows, and an index that survives kills.

Rows are appended to JSON Lines files. ``ledger.sqlite`` holds one small entry for each request and
the sums. ``sync`` makes rows durable first and the index second, so after a kill the index is
behind the files at most, never ahead: ``Ledger`` reads on where it ended. Without an index it is
made again from the files. Lookups read the disk, so memory does not grow with the requests.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from proxykd_jax.artifacts import sync_folder
from proxykd_jax.errors import UserError
from proxykd_jax.texts.json_files import MAX_RECORD_BYTES

INDEX = "ledger.sqlite"
# Only the answers' file has an ending that readers of a folder take.
FILES = {
    "failed": "failed.log",
    "set_aside": "set_aside.log",
    "answers": "answers.jsonl",
}
IN_DOUBT = "in_doubt.log"

# States of a request. PENDING was tried and is to be tried again. SENT is under way. DOUBT was
# under way at a kill. GAVE_UP failed in ways that may pass, FAILED for good. BATCHED is in a batch
# file.
PENDING, SENT, DOUBT, ANSWERED, SET_ASIDE, GAVE_UP, FAILED, BATCHED = range(8)

_VERSION = 1
_SHORTEST_SECRET = 8
_TABLES = """
create table if not exists request (
  key blob primary key, state integer, attempts integer, turn integer, lost integer,
  held real, run integer
) without rowid;
create table if not exists meta (name text primary key, value);
"""


class Entry(NamedTuple):
    """What is known of a request.

    Attributes:
      state: one of the states above.
      attempts: how often it was sent.
      turn: number of its idempotency key.
      lost: whether an attempt under this idempotency key had no complete reply.
      held: the most that the attempt under way may cost.
      run: number of the run that changed it last.
    """

    state: int = PENDING
    attempts: int = 0
    turn: int = 0
    lost: bool = False
    held: float = 0.0
    run: int = 0


class Ledger:
    """The folder of a collection, open for one process.

    Args:
      folder: made if absent.
      settings: what all answers of the folder share; kept in the index and compared.
      secret: the key of the server, which no line may contain.

    Attributes:
      run: number of this run.
      requests, spent: sums over all runs; ``sync`` stores them.
      in_doubt: requests that were under way at a kill and have no end since; ``in_doubt.log``
        has the ids.

    Raises:
      UserError: another process uses the folder, its settings are others, or a file is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], secret: str = "") -> None:
        self.folder, self._secret = folder, secret
        self.run = self.requests = self.in_doubt = 0
        self.spent = 0.0
        self._changing, self._dirty = False, set[str]()
        self._files: dict[str, IO[bytes]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(folder / INDEX, timeout=0, isolation_level=None)
            self._open(settings)
        except sqlite3.DatabaseError as error:
            raise self._trouble(error) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from None

    def lookup(self, key: str) -> Entry | None:
        """The entry of a request."""
        found = self._index.execute(
            "select state, attempts, turn, lost, held, run from request where key = ?",
            (bytes.fromhex(key),),
        ).fetchone()
        return None if found is None else Entry(*found)

    def put(self, key: str, entry: Entry) -> None:
        """Changes the entry of a request; durable after ``sync``."""
        self._change(
            "insert or replace into request values (?, ?, ?, ?, ?, ?, ?)",
            (bytes.fromhex(key), *entry),
        )

    @property
    def has_answers(self) -> bool:
        """Whether a request has ever been answered, completely or not."""
        return any(self._files[kind].tell() for kind in ("answers", "set_aside"))

    def append(self, kind: str, row: Mapping[str, Any]) -> None:
        """Appends a row to one of ``FILES``; durable after ``sync``.

        A row that readers would refuse for its length loses its log-probs.
        """
        self._change()
        line = self._line(row)
        if len(line) > MAX_RECORD_BYTES and "logprobs" in row:
            line = self._line({**row, "logprobs": None})
        self._files[kind].write(line)
        self._dirty.add(kind)

    def sync(self) -> None:
        """Makes all changes durable.

        Raises:
          UserError: the disk refuses.
        """
        if not self._changing:
            return
        try:
            for kind in self._dirty:
                self._files[kind].flush()
                os.fsync(self._files[kind].fileno())
                self._put_meta(f"end of {kind}", self._files[kind].tell())
            self._put_meta("requests", self.requests)
            self._put_meta("spent", self.spent)
            self._index.execute("commit")
        except sqlite3.DatabaseError as error:
            raise self._trouble(error) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror or error}. Everything before "
                "is saved; make room, then run the same command again."
            ) from None
        self._dirty.clear()
        self._changing = False

    def counts(self) -> dict[int, int]:
        """Requests in each state."""
        return dict(self._index.execute("select state, count(*) from request group by state"))

    def close(self) -> None:
        """Closes the files; what was not synced is lost, as by a kill."""
        for file in self._files.values():
            file.close()
        self._index.close()

    # --- opening ----------------------------------------------------------------------------------

    def _open(self, settings: Mapping[str, Any]) -> None:
        # One process at a time; and without shared memory the index may lie on a network's disk.
        self._index.execute("pragma locking_mode = exclusive")
        self._index.execute("pragma journal_mode = wal")
        self._index.execute("pragma synchronous = full")
        self._index.execute("pragma wal_autocheckpoint = 4000")  # pages of 4 KiB
        self._index.execute("begin immediate")
        self._index.execute("commit")
        self._index.executescript(_TABLES)
        self._change()
        self._check(settings)
        self.run = int(self._meta("run", 0)) + 1
        self._put_meta("run", self.run)
        self.requests = int(self._meta("requests", 0))
        self.spent = float(self._meta("spent", 0.0))
        self._files = {
            kind: open(self.folder / name, "ab")  # noqa: SIM115 (closed by ``close``)
            for kind, name in FILES.items()
        }
        sync_folder(self.folder)
        for kind in FILES:
            self._read_on(kind)
        self._note_doubts()
        self.in_doubt = self.counts().get(DOUBT, 0)
        self.sync()

    def _check(self, settings: Mapping[str, Any]) -> None:
        if self._meta("version", _VERSION) != _VERSION:
            raise UserError(f"{self.folder / INDEX} was made by another version of this program.")
        self._put_meta("version", _VERSION)
        text = json.dumps(settings, sort_keys=True)
        kept = self._meta("settings", text)
        if kept != text:
            changed = [
                f"collect.{name} was {json.dumps(value)} and is now {json.dumps(settings[name])}"
                for name, value in json.loads(kept).items()
                if value != settings[name]
            ]
            raise UserError(
                f"{self.folder} holds answers to other requests: {'; '.join(changed)}. Name "
                "another folder under collect.folder, or set the keys back."
            )
        self._put_meta("settings", text)

    def _read_on(self, kind: str) -> None:
        """Takes the rows that the index does not know yet, and removes a torn last line."""
        path = self.folder / FILES[kind]
        known, size = int(self._meta(f"end of {kind}", 0)), path.stat().st_size
        if known > size:
            raise UserError(
                f"{path} is shorter than when it was written last. Put it back, or remove "
                f"{self.folder / INDEX}: it is then made again from the files."
            )
        end = known
        with open(path, "rb") as file:
            file.seek(known)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._take(kind, line, path)
                end += len(line)
        if end < size:
            os.truncate(path, end)
        self._files[kind].seek(0, os.SEEK_END)
        self._put_meta(f"end of {kind}", end)

    def _take(self, kind: str, line: bytes, path: Path) -> None:
        try:
            row = json.loads(line)
            key, cost = row["id"], float(row.get("cost") or 0.0)
            entry = self.lookup(key)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} has a damaged line: {line[:60]!r}. Remove the line, or put the file back."
            ) from error
        state = {"answers": ANSWERED, "set_aside": SET_ASIDE}.get(kind)
        if state is None:
            state = FAILED if row.get("final") else GAVE_UP
        if entry is None:
            self.requests += 1
        elif entry.state == BATCHED:  # its most is counted in the sum
            self.spent -= entry.held
        self.spent += cost
        self.put(key, (entry or Entry(attempts=1))._replace(state=state, held=0.0))

    def _note_doubts(self) -> None:
        """Marks what was under way at a kill; it may have been paid, so the most is counted."""
        found = self._index.execute(
            "select key, attempts, held from request where state = ?", (SENT,)
        ).fetchall()
        if found:
            noticed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            with open(self.folder / IN_DOUBT, "ab") as file:
                for key, attempts, _ in found:
                    row = {"id": key.hex(), "attempt": attempts, "noticed": noticed}
                    file.write(self._line(row))
                file.flush()
                os.fsync(file.fileno())
        self.spent += sum(held for _, _, held in found)
        self._change(
            "update request set state = ?, lost = 1, held = 0 where state = ?", (DOUBT, SENT)
        )

    # --- below ------------------------------------------------------------------------------------

    def _line(self, row: Mapping[str, Any]) -> bytes:
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            data = line.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            data = json.dumps(row, allow_nan=False).encode()
        # A shorter "key" of a local server may be a word of the language.
        if len(self._secret) >= _SHORTEST_SECRET:
            data = data.replace(self._secret.encode(), b"***")
        return data + b"\n"

    def _change(self, statement: str = "", values: tuple[Any, ...] = ()) -> None:
        if not self._changing:
            self._index.execute("begin")
            self._changing = True
        if statement:
            self._index.execute(statement, values)

    def _meta(self, name: str, otherwise: Any) -> Any:
        found = self._index.execute("select value from meta where name = ?", (name,)).fetchone()
        return otherwise if found is None else found[0]

    def _put_meta(self, name: str, value: Any) -> None:
        self._index.execute("insert or replace into meta values (?, ?)", (name, value))

    def _trouble(self, error: sqlite3.DatabaseError) -> UserError:
        path = self.folder / INDEX
        if "locked" in str(error):
            return UserError(f"{self.folder} is in use by another collect; let it end first.")
        if isinstance(error, sqlite3.OperationalError):
            return UserError(
                f"{path} cannot be written ({error}). Everything before is saved; make room, then "
                "run the same command again."
            )
        return UserError(
            f"{path} is damaged ({error}). Remove it: it is then made again from the files."
        )
