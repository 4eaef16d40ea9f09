"""The guard: URLs, addresses, connections, and limits on what is read."""

import datetime
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation.errors import ConfigError
from pipelines.fetch_address import is_allowed
from pipelines.fetch_errors import OPTED_OUT_MESSAGE, FetchError, Reason
from pipelines.fetch_url import encode_url, redirect_url
from pipelines.guard import MAX_REDIRECTS, FetchPolicy, GuardedOpener, installed
from tests.pipelines.faulty_server import MAX_BYTES, FaultyServer, photo

LOOPBACK = FetchPolicy(allow_private=True, max_bytes=MAX_BYTES, timeout=5, max_seconds=10)
PUBLIC_ADDRESS = "93.184.216.34"


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as running:
        yield running


@pytest.fixture
def opener() -> GuardedOpener:
    return GuardedOpener(LOOPBACK)


class Network:
    """Names and connections under the tests' control: nothing but loopback is ever reached.

    Attributes:
        names: name -> addresses, or the error of its look-up.
        tried: addresses to which a connection was attempted.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        self.names: dict[str, list[str] | Exception] = {}
        self.tried: list[str] = []
        self._port = port
        self._connect = socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)
        monkeypatch.setattr(socket, "create_connection", self._route)

    def _look_up(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        found = self.names.get(host, [host])
        if isinstance(found, Exception):
            raise found
        return [(_family(address), socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def _route(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.tried.append(address[0])
        assert address[0] == PUBLIC_ADDRESS or ipaddress.ip_address(address[0]).is_loopback, "left loopback"
        sock = socket.socket()
        sock.settimeout(timeout)
        sock.connect(("127.0.0.1", self._port))
        return sock


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, server: FaultyServer) -> Network:
    return Network(monkeypatch, server.server_port)


def refusal(opener: GuardedOpener, url: str) -> tuple[str, str]:
    """Reason and detail with which a URL fails to open or to be read."""
    with pytest.raises(FetchError) as caught, opener.open(url) as response:
        response.read()
    return str(caught.value.reason), caught.value.detail


# --- URLs


@pytest.mark.parametrize(
    ("url", "encoded"),
    [
        ("http://a.example/b.jpg", "http://a.example/b.jpg"),
        ("  HTTPS://A.example  ", "https://a.example/"),
        ("http://a.example/häuser am see.jpg?q=ü v#top", "http://a.example/h%C3%A4user%20am%20see.jpg?q=%C3%BC%20v"),
        ("http://a.example/50%25 off;v=1,2", "http://a.example/50%25%20off;v=1,2"),
        ("http://bücher.example:8080/", "http://xn--bcher-kva.example:8080/"),
        ("http://[2001:DB8::1]:80/x", "http://[2001:db8::1]:80/x"),
        ('http://a.example/"<x>|?y[]={1}', "http://a.example/%22%3Cx%3E%7C?y[]=%7B1%7D"),
    ],
)
def test_urls_are_encoded_once(url: str, encoded: str) -> None:
    assert encode_url(url) == encoded
    assert encode_url(encoded) == encoded


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "bad_url"),
        ("", "bad_url"),
        ("  ", "bad_url"),
        ("a.example/b.jpg", "bad_url"),
        ("//a.example/b.jpg", "bad_url"),
        ("http:///b.jpg", "bad_url"),
        ("http://a.example:port/", "bad_url"),
        ("http://a.example:99999/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://a..example/", "bad_url"),
        (f"http://{'a' * 64}.example/", "bad_url"),
        ("http://a b.example/", "bad_url"),
        ("http://a.example\\@b.example/", "bad_url"),
        ("http://user:secret@a.example/", "bad_url"),
        ("http://a.example/a\r\nHost: b", "bad_url"),
        ("http://a.example/\ud800", "bad_url"),
        ("file:///etc/hostname", "scheme"),
        ("ftp://a.example/b.jpg", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("javascript:alert(1)", "scheme"),
    ],
)
def test_what_is_no_web_url_is_refused(url: str | None, reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        encode_url(url)
    assert caught.value.reason == reason
    assert not caught.value.retryable


def test_redirect_urls_are_relative_to_their_page() -> None:
    assert redirect_url("http://a.example/x/y?q=1", "../z w") == "http://a.example/z%20w"
    assert redirect_url("https://a.example/x", "//b.example/ü".encode().decode("latin-1")) == "https://b.example/%C3%BC"


# --- errors as text


def test_errors_survive_as_text() -> None:
    for reason in Reason:
        again = FetchError.parse(str(FetchError(reason, "a detail: with a colon")))
        assert (again.reason, again.detail) == (reason, "a detail: with a colon")
    assert FetchError.parse(OPTED_OUT_MESSAGE).reason is Reason.OPTED_OUT
    assert FetchError.parse("<object at 0x7f00>: x").detail == "unexpected error in the downloader"


# --- addresses


PUBLIC = ["8.8.8.8", PUBLIC_ADDRESS, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address, allow_private=False)


PRIVATE = ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "0.0.0.0", "::1", "fd00::1", "::ffff:127.0.0.1"]
NEVER = ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::1%eth0", "224.0.0.1", "ff02::1"]
SPECIAL = ["100.64.0.1", "240.0.0.1", "2002:7f00:1::1", "2001:0:7f00:1::1", "64:ff9b:1::1", "fec0::1", "::8.8.8.8"]


@pytest.mark.parametrize("address", PRIVATE + NEVER + SPECIAL)
def test_other_addresses_are_not_allowed(address: str) -> None:
    assert not is_allowed(address, allow_private=False)


def test_private_addresses_can_be_allowed_but_metadata_services_cannot() -> None:
    assert all(is_allowed(address, allow_private=True) for address in PRIVATE)
    assert not any(is_allowed(address, allow_private=True) for address in NEVER)


@pytest.mark.parametrize("addresses", [["169.254.169.254"], ["10.0.0.1"], ["::1"], [PUBLIC_ADDRESS, "10.0.0.1"]])
def test_a_name_of_a_forbidden_address_is_never_connected_to(network: Network, addresses: list[str]) -> None:
    network.names["innocent.example"] = addresses
    refused = refusal(GuardedOpener(FetchPolicy()), "http://innocent.example/x.jpg")
    assert refused == ("forbidden_address", "the host's address is not public")
    assert network.tried == []


def test_a_redirect_to_a_forbidden_address_is_never_connected_to(network: Network, server: FaultyServer) -> None:
    network.names |= {"public.example": [PUBLIC_ADDRESS], "inside.example": ["10.0.0.1"]}
    server.pages["/in"] = lambda to: to.answer(b"", 302, Location="http://inside.example/secret")
    opener = GuardedOpener(FetchPolicy())
    assert refusal(opener, "http://public.example/in")[0] == "forbidden_address"
    assert refusal(opener, "http://public.example/to-metadata")[0] == "forbidden_address"
    assert network.tried == [PUBLIC_ADDRESS] * 2


def test_the_address_looked_up_is_the_one_connected_to(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers otherwise the second time gains nothing: there is no second time."""
    answers = iter([PUBLIC_ADDRESS])
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **kw: look_up(next(answers), port, **kw))
    with GuardedOpener(FetchPolicy()).open("http://rebinding.example/photo.png") as response:
        assert response.read() == photo("png")
    assert network.tried == [PUBLIC_ADDRESS]


def test_the_next_address_is_tried_when_one_does_not_answer(
    network: Network, opener: GuardedOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = socket.create_connection

    def one_is_down(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == "::1":
            raise ConnectionRefusedError
        return route(address, timeout)

    monkeypatch.setattr(socket, "create_connection", one_is_down)
    network.names["two.example"] = ["::1", "127.0.0.1"]
    with opener.open("http://two.example/photo.png") as response:
        assert response.read() == photo("png")


@pytest.mark.parametrize(("code", "reason"), [(socket.EAI_NONAME, "host_not_found"), (socket.EAI_AGAIN, "dns")])
def test_failures_of_name_resolution(network: Network, opener: GuardedOpener, code: int, reason: str) -> None:
    network.names["gone.example"] = socket.gaierror(code, "as the system puts it")
    assert refusal(opener, "http://gone.example/")[0] == reason


# --- requests


def test_the_body_is_read_as_served(opener: GuardedOpener, server: FaultyServer) -> None:
    for path, body in [("/photo.webp", photo("webp")), ("/chunked", photo())]:
        with opener.open(server.url(path)) as response:
            assert response.read() == body
    assert server.agents == {LOOPBACK.user_agent}
    assert opener.final_urls == {}


def test_redirects_are_followed_and_their_end_is_kept(opener: GuardedOpener, server: FaultyServer) -> None:
    opener.open(server.url("/hop1")).read()
    opener.open(server.url("/to-umlaut")).read()
    end = server.url("/h%C3%A4user%20am%20see.jpg?a=%C3%BC")
    assert opener.final_urls == {server.url("/hop1"): server.url("/photo.png"), server.url("/to-umlaut"): end}


def test_a_loop_of_redirects_ends(opener: GuardedOpener, server: FaultyServer) -> None:
    assert refusal(opener, server.url("/loop")) == ("too_many_redirects", f"more than {MAX_REDIRECTS} redirects")
    assert server.asked["/loop"] == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("path", "reason", "detail"),
    [
        ("/404", "http_not_found", "HTTP 404"),
        ("/410", "http_not_found", "HTTP 410"),
        ("/403", "http_forbidden", "HTTP 403"),
        ("/429", "http_rate_limited", "HTTP 429"),
        ("/418", "http_client_error", "HTTP 418"),
        ("/408", "timeout", "HTTP 408"),
        ("/500", "http_server_error", "HTTP 500"),
        ("/304", "bad_response", "HTTP 304"),
        ("/to-nowhere", "bad_response", "a redirect without a location"),
        ("/to-file", "scheme", "redirect: file: is not fetched"),
        ("/to-metadata", "forbidden_address", "the host's address is not public"),
        ("/no-http", "bad_response", "BadStatusLine"),
        ("/no-answer", "connection", "closed"),
        ("/reset", "connection", "closed"),
        ("/empty", "empty", "no bytes"),
        ("/short", "truncated", "the body ended early"),
        ("/short-chunked", "truncated", "the body ended early"),
        ("/declared", "too_large", f"declared {MAX_BYTES + 1} bytes, limit {MAX_BYTES}"),
        ("/endless", "too_large", f"more than {MAX_BYTES} bytes"),
    ],
)
def test_faults_have_reasons(opener: GuardedOpener, server: FaultyServer, path: str, reason: str, detail: str) -> None:
    assert refusal(opener, server.url(path)) == (reason, detail)


def test_a_refused_connection(opener: GuardedOpener) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert refusal(opener, f"http://127.0.0.1:{port}/") == ("connection", "refused")


@pytest.mark.parametrize("path", ["/slow-body", "/slow-head"])
def test_a_drip_ends_at_the_deadline(server: FaultyServer, path: str) -> None:
    """Every read gets its byte in time, so only the limit on the whole can end this."""
    opener = GuardedOpener(FetchPolicy(allow_private=True, timeout=60, max_seconds=0.3))
    assert refusal(opener, server.url(path)) == ("too_slow", "not done in 0.3 seconds")


def test_silence_ends_at_the_timeout_or_the_deadline(server: FaultyServer) -> None:
    patient = FetchPolicy(allow_private=True, timeout=0.2, max_seconds=60)
    assert refusal(GuardedOpener(patient), server.url("/silent")) == ("timeout", "no answer in time")
    hurried = FetchPolicy(allow_private=True, timeout=60, max_seconds=0.2)
    assert refusal(GuardedOpener(hurried), server.url("/silent"))[0] == "too_slow"


def test_the_deadline_is_one_for_all_redirects(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hop costs a second on this clock."""
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    opener = GuardedOpener(FetchPolicy(allow_private=True, max_seconds=9))
    assert refusal(opener, server.url("/loop"))[0] == "too_slow"
    assert 0 < server.asked["/loop"] <= MAX_REDIRECTS


def test_nothing_but_http_is_opened(opener: GuardedOpener, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(photo())
    for url in [(tmp_path / "a.jpg").as_uri(), "ftp://127.0.0.1/a.jpg", "data:image/png;base64,AAAA"]:
        assert refusal(opener, url)[0] == "scheme"


def test_a_stopped_guard_opens_nothing(opener: GuardedOpener, server: FaultyServer) -> None:
    opener.stop.set()
    assert refusal(opener, server.url("/photo.png")) == ("internal", "stopped")
    assert not server.asked


def test_proxies_of_the_environment_are_not_used(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setattr(urllib.request, "_opener", None)
    opener = GuardedOpener(LOOPBACK)
    with installed(opener):
        assert urllib.request.urlopen(server.url("/photo.png"), timeout=5).read() == photo("png")
        assert urllib.request._opener is opener  # type: ignore[attr-defined]
    assert urllib.request._opener is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("user_agent", ["", " ", "a\r\nHost: b", "bücher"])
def test_a_user_agent_must_be_one_line_of_ascii(user_agent: str) -> None:
    with pytest.raises(ConfigError, match="user_agent"):
        FetchPolicy(user_agent=user_agent)


def test_the_name_of_a_user_agent() -> None:
    assert FetchPolicy().user_agent_token == "lvd-builder"
    assert FetchPolicy(user_agent="MyLab/2.0 (me@example.org)").user_agent_token == "mylab"


# --- TLS


def _certificate(folder: Path, host: str) -> Path:
    """A self-signed certificate and its key in one PEM file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + made.sign(key, hashes.SHA256()).public_bytes(pem))
    return path


def test_tls_checks_the_name_and_loads_certificates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _certificate(tmp_path, "images.example")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(path)
    trusting = ssl.create_default_context(cafile=str(path))
    contexts = [trusting]
    monkeypatch.setattr(ssl, "create_default_context", contexts.pop)
    with FaultyServer(server_side) as server:
        network = Network(monkeypatch, server.server_port)
        network.names |= {"images.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
        opener = GuardedOpener(LOOPBACK)
        for _ in range(3):
            with opener.open(server.url("/photo.png", "images.example", "https")) as response:
                assert response.read() == photo("png")
        reason, detail = refusal(opener, server.url("/photo.png", "other.example", "https"))
    assert reason == "tls"
    assert "other.example" in detail
    assert contexts == []


def test_plain_http_behind_an_https_url(opener: GuardedOpener, server: FaultyServer) -> None:
    assert refusal(opener, server.url("/photo.png", scheme="https"))[0] == "tls"
