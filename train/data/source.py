"""Read remote shards as blocks of bytes: HTTP with requests, commands with WebDataset, object stores with fsspec.

Nothing here imports torch until a command is read.
"""

import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16  # bytes; each further block counts as progress
# What curl and a shell mean by their exit codes.
EXIT_CODES = {22: ": the server refused, such as 404 not found or an expired link", 127: ": not installed"}
PASSING = {408, 425, 429}  # HTTP status codes below 500 for which a retry may help
LASTING = {501, 505}  # those from 500 on for which it will not


class Unreachable(Exception):
    """Why a source gave no shard, whether a retry may help, and how many seconds to wait at least before it."""

    def __init__(self, reason: str, may_pass: bool = True, delay: float = 0.0):
        super().__init__(reason)
        self.may_pass, self.delay = may_pass, delay


def has_neighbours(shard: str) -> bool:
    """Whether to look for a manifest in a shard's folder; not with commands, which may fail with pages of output."""
    scheme = urlsplit(shard).scheme
    if scheme in ("http", "https"):
        return True
    from webdataset.gopen import gopen_schemes

    return scheme not in gopen_schemes


def blocks_of(shard: str, timeout: float, at_end: Callable[[Callable[[], None]], None]) -> Iterator[bytes]:
    """All bytes of a shard, from whatever opens it: requests, WebDataset (pipe:, gs:, ...), or fsspec (s3:, abfs:, ...).

    Args:
        timeout: seconds without a byte, for sources that accept a limit.
        at_end: called with a function that ends any other source when another thread calls it.

    Raises:
        Unreachable: for any failure of the source.
    """
    scheme = urlsplit(shard).scheme
    if scheme in ("http", "https"):
        yield from _from_http(shard, timeout)
        return
    from webdataset.gopen import gopen_schemes

    if scheme in gopen_schemes:
        yield from _from_command(shard, scheme, at_end)
    else:
        yield from _from_fsspec(shard, scheme)


def _from_http(url: str, timeout: float) -> Iterator[bytes]:
    """As curl would: proxies of the environment, ~/.netrc, user:password@ in the URL, redirects, the system's certificates."""
    import requests
    import urllib3

    parts = urlsplit(url)
    with _session() as session:
        # Requests would prefer ~/.netrc, and ignores a user without a password.
        if parts.username is not None:
            session.auth = unquote(parts.username).encode(), unquote(parts.password or "").encode()
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        try:
            # The read limit is a little longer than the waiting thread's, so that every stall gives the same message.
            limits = 0.9 * timeout, timeout + 5
            response = session.get(url, stream=True, timeout=limits, headers={"Accept-Encoding": "identity"})
            if not 200 <= response.status_code < 300:
                raise _refused(response)
            yield from response.raw.stream(BLOCK, decode_content=True)
        except (requests.TooManyRedirects, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise Unreachable(_one_line(error), may_pass=False) from None
        except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:  # requests' are OSErrors
            raise _unreachable(error, timeout) from None


def _session():
    """A session that also trusts the system's certificates, besides those of requests or REQUESTS_CA_BUNDLE."""
    import requests

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *arguments, **options):
            super().init_poolmanager(*arguments, ssl_context=_system_certificates(), **options)

        def proxy_manager_for(self, proxy, **options):
            return super().proxy_manager_for(proxy, ssl_context=_system_certificates(), **options)

    session = requests.Session()
    session.mount("https://", Adapter())
    return session


@cache
def _system_certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _refused(response) -> Unreachable:
    """The error for a status code that is no success."""
    import urllib3

    status = response.status_code
    may_pass = status in PASSING or (status >= 500 and status not in LASTING)
    delay = 0.0
    if asked := response.headers.get("Retry-After"):
        with suppress(urllib3.exceptions.InvalidHeader):
            delay = urllib3.Retry().parse_retry_after(asked)
    wait = f", asks to wait {delay:.0f} s" if delay and may_pass else ""
    return Unreachable(f"HTTP {status} {response.reason}{wait}", may_pass, delay)


def _unreachable(error: BaseException, timeout: float) -> Unreachable:
    """The error, by the root cause behind the exceptions of requests and urllib3."""
    import requests
    import urllib3

    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if isinstance(error, requests.ConnectTimeout):
        return Unreachable(f"no connection in {0.9 * timeout:.3g} s")
    for cause in causes:
        if isinstance(cause, urllib3.exceptions.IncompleteRead) and cause.expected:
            return Unreachable(f"broke off after {cause.partial:,} bytes, {cause.expected:,} are missing")
    known = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    lasting = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
    return Unreachable(known[-1] if known else _one_line(error), may_pass=not lasting)


def _from_command(shard: str, scheme: str, at_end: Callable[[Callable[[], None]], None]) -> Iterator[bytes]:
    import psutil
    from webdataset.gopen import Pipe, gopen_schemes

    try:
        source = gopen_schemes[scheme](shard, mode="rb", bufsize=BLOCK)
    except FileNotFoundError as error:  # WebDataset reads gs: through gsutil, and others through other commands
        raise Unreachable(f"the command {error.filename} is not installed", may_pass=False) from None
    except Exception as error:  # hf: asks a server first
        raise Unreachable(f"{type(error).__name__}: {_one_line(error)}") from None
    assert isinstance(source, Pipe), shard
    process = psutil.Process(source.proc.pid)

    def kill() -> None:
        """Kill the process and its children: a shell's command holds the pipe, too."""
        with suppress(psutil.Error):
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.Error):
                    one.kill()

    at_end(kill)
    try:
        while block := source.stream.read(BLOCK):
            yield block
        source.stream.close()
        code = source.proc.wait()
    finally:
        if source.proc.poll() is None:
            kill()
            source.proc.wait()
    if code and code != -signal.SIGPIPE:
        reason = f"its command ended with exit code {code}{EXIT_CODES.get(code, '')}"
        raise Unreachable(reason, may_pass=code != 127)


def _from_fsspec(shard: str, scheme: str) -> Iterator[bytes]:
    import fsspec

    try:
        with fsspec.open(shard, "rb") as source:
            while block := source.read(BLOCK):
                yield block
    except ValueError:  # no such protocol
        raise Unreachable(f"nothing here opens {scheme}: URLs", may_pass=False) from None
    except ImportError as error:  # it says which package to install
        raise Unreachable(_one_line(error), may_pass=False) from None
    except FileNotFoundError:
        raise Unreachable("no such file", may_pass=False) from None
    except PermissionError as error:
        raise Unreachable(f"refused: {_one_line(error)}", may_pass=False) from None
    except Exception as error:  # each object store has errors of its own
        raise Unreachable(f"{type(error).__name__}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
