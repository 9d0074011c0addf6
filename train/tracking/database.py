"""MLflow's SQLite database beside the runs: complete, or not there.

MLflow creates its tables in some seventy steps, in place and without a lock: two processes that start at once break the
file for both, and a process that dies meanwhile leaves a part that MLflow can neither use nor complete. Here one
process at a time creates the file under another name and then links it into place; a broken one is set aside, never
deleted.
"""

import logging
import os
import shutil
import socket
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal

from powernap.model.errors import PowernapError
from powernap.train.run.lock import ProcessLock

logger = logging.getLogger(__name__)

LOCK_SECONDS = 120.0  # how long to wait for another process that creates or upgrades the database
STILL_SECONDS = 5.0  # a partial database without writes for this long will not be completed
SIDE_FILES = ("-journal", "-wal", "-shm")  # SQLite's own; one left beside another database would damage it

State = Literal["absent", "whole", "old", "newer", "broken"]


class DatabaseError(PowernapError):
    """Why the database cannot be used, in one line."""


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite database; None for another tracking URI."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if not uri.startswith("sqlite"):
        return None
    try:
        name = make_url(uri).database
    except ArgumentError:
        return None
    return Path(os.path.abspath(name)) if name and name != ":memory:" else None


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that is now at `path`; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def prepare_database(path: Path, ours: bool = True, thorough: bool = False) -> None:
    """Leave a complete database with this MLflow's schema at `path`. Any number of processes may call this at once.

    A missing one is created. A broken one is renamed (PATH.broken-TIME) and recreated; one of an older MLflow is
    upgraded, and a copy from before is kept (PATH.schema-REVISION-TIME).

    ours: False for a database that the user has named: a broken or old one is left unchanged.
    thorough: read all of it to find damage.

    Raises:
        DatabaseError: if the database is a newer MLflow's, if the user must repair it, or if another process works on
            it for more than LOCK_SECONDS.
        Exception: SQLite's and the file system's, such as a full disk.
    """
    if _judge(path, thorough)[0] != "whole":
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(path.with_name(path.name + ".lock"))
        if not lock.acquire(timeout=5):
            logger.warning("waiting for another process that prepares %s", path)
            if not lock.acquire(timeout=LOCK_SECONDS):
                raise DatabaseError(f"{path}.lock: another process has held it for {LOCK_SECONDS:.0f} s")
        try:
            _repair(path, ours, thorough)
        finally:
            lock.release()
    _forget_connections(path)


def _repair(path: Path, ours: bool, thorough: bool) -> None:
    """The caller holds the lock."""
    state, reason = _settled(path, thorough)
    if state == "newer":
        raise DatabaseError(
            f"{path} was written by a newer MLflow ({reason}): install that one, or choose another run.root"
        )
    if state == "old" and ours:
        state, reason = _upgrade(path, reason)
    elif state == "old":
        raise DatabaseError(
            f"{path} was written by an older MLflow ({reason}): back it up, then run `mlflow db upgrade sqlite:///{path}`"
        )
    if state == "broken" and not ours:
        raise DatabaseError(f"{path} is no whole MLflow database ({reason}): rename it, then run `powernap sync`")
    if state == "broken":
        aside = _set_aside(path, "broken")
        logger.warning(
            "%s is no whole MLflow database (%s): set aside as %s; `powernap sync` delivers the runs beside it into a new one",
            path,
            reason,
            aside.name,
        )
    if state in ("absent", "broken"):
        _create(path)


def _judge(path: Path, thorough: bool = False) -> tuple[State, str]:
    """The file's state, and why: its schema's revision, or what is wrong."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import Base, _get_alembic_config

    try:
        if not path.stat().st_size:
            return "broken", "it is empty"
    except FileNotFoundError:
        return "absent", ""
    try:
        # We only read, but an unfinished write of a killed process may have to be rolled back.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=20)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            version = "alembic_version" in tables
            heads = [row[0] for row in database.execute("select version_num from alembic_version")] if version else []
            check = database.execute("pragma quick_check(1)").fetchone()[0] if thorough else "ok"
    except sqlite3.DatabaseError as error:
        if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return "broken", str(error)
        raise
    if len(heads) != 1:
        return "broken", f"{len(tables)} tables, {len(heads) or 'no'} schema revision{'s'[: len(heads) > 1]}"
    if check != "ok":
        return "broken", " ".join(check.split())
    scripts = ScriptDirectory.from_config(_get_alembic_config(""))
    if heads[0] not in (script.revision for script in scripts.walk_revisions()):
        return "newer", f"schema {heads[0]}"
    if heads != scripts.get_heads():
        return "old", f"schema {heads[0]}"
    missing = sorted(set(Base.metadata.tables) - tables)
    return ("broken", f"table {missing[0]} is missing") if missing else ("whole", "")


def _settled(path: Path, thorough: bool) -> tuple[State, str]:
    """As `_judge`, once nobody writes any more: an MLflow server, which takes no lock, may be creating its tables."""
    before, since = None, time.monotonic()
    while True:
        state = _judge(path, thorough)
        if state[0] not in ("broken", "old"):
            return state
        with suppress(FileNotFoundError):
            status = path.stat()
            now = status.st_size, status.st_mtime_ns
            if now != before:
                before, since = now, time.monotonic()
            # Or old by its timestamp: a minute allows for the clock of another machine that wrote it.
            if time.monotonic() - since >= STILL_SECONDS or time.time() - status.st_mtime > 60:
                return state
        time.sleep(0.25)


def _create(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = _beside(path)
    uri = f"sqlite:///{new}"
    try:
        # Its tables and its first experiment.
        SqlAlchemyStore(uri, (path.parent / "mlartifacts").as_uri()).engine.dispose()
        if any(path.with_name(path.name + end).exists() for end in SIDE_FILES):  # of a database that was removed
            _set_aside(path, "broken")
        try:
            os.link(new, path)  # unlike a rename, never replaces a file that another machine has made without our lock
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(new, path)
    finally:
        SqlAlchemyStore._engine_map.pop(uri, None)
        _remove(new)


def _upgrade(path: Path, revision: str) -> tuple[State, str]:
    """Upgrade a copy, then write it back in one transaction: processes that have the database open keep it.

    A partial database may look like an old schema; its upgrade fails, and it counts as broken.
    """
    from alembic.util.exc import CommandError
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    new, copy = _beside(path), _free_name(path, revision.replace(" ", "-"))
    upgraded = False
    try:
        with closing(sqlite3.connect(path)) as old:
            version = old.execute("pragma data_version").fetchone()
            with closing(sqlite3.connect(copy)) as target:
                _copy(old, target)
            shutil.copyfile(copy, new)
            engine = create_sqlalchemy_engine(f"sqlite:///{new}")
            try:
                _upgrade_db(engine)
            except (SQLAlchemyError, CommandError) as error:
                cause = error.orig if isinstance(error, DBAPIError) else error
                if isinstance(cause, sqlite3.Error) and _code(cause) in ENVIRONMENT_CODES:
                    raise
                return "broken", f"{revision}, and its upgrade fails: {' '.join(str(cause).split())[:120]}"
            finally:
                engine.dispose()
            state = _judge(new)
            if state[0] != "whole":
                return "broken", f"{revision}, and after its upgrade {state[1]}"
            if old.execute("pragma data_version").fetchone() != version:
                raise DatabaseError(f"{path}: another process wrote to it during its upgrade: it will be tried again")
            with closing(sqlite3.connect(new)) as source:
                _copy(source, old)
        upgraded = True
        logger.warning("%s was upgraded from an older MLflow's %s; a copy from before is %s", path, revision, copy.name)
        return "whole", ""
    finally:
        _remove(new)
        if not upgraded:
            _remove(copy)


def _copy(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copy in one transaction. Python alone would wait forever for a locked database."""
    start = time.monotonic()

    def check(status: int, *_: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() - start > LOCK_SECONDS:
            raise DatabaseError(f"another process has locked the database for {LOCK_SECONDS:.0f} s")

    source.backup(target, progress=check)


# Errors that are not the database's fault.
ENVIRONMENT_CODES = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _set_aside(path: Path, why: str) -> Path:
    aside = _free_name(path, why)
    for end in (*SIDE_FILES, ""):
        with suppress(FileNotFoundError):
            os.rename(path.with_name(path.name + end), aside.with_name(aside.name + end))
    return aside


def _free_name(path: Path, why: str) -> Path:
    name = f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = {one.name for one in path.parent.iterdir()}
    number = 0
    while any(other.startswith(name + f".{number}" * bool(number)) for other in taken):
        number += 1
    return path.with_name(name + f".{number}" * bool(number))


def _beside(path: Path) -> Path:
    """Where to create a database; leftovers of killed processes are removed."""
    for file in path.parent.iterdir():
        if file.name.startswith(f"{path.name}.new-"):
            file.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.new-{socket.gethostname()}-{os.getpid()}")


def _remove(path: Path) -> None:
    for end in ("", *SIDE_FILES):
        with suppress(OSError):
            path.with_name(path.name + end).unlink(missing_ok=True)


def _forget_connections(path: Path) -> None:
    """Close the connections that MLflow keeps: they may be to an earlier file at this path."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in list(SqlAlchemyStore._engine_map.values()):
        if engine.url.database == str(path):
            engine.dispose()
