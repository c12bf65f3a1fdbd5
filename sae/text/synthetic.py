"""Text generated from a seed: six domains whose features are easy to name (DNA, base64, hex, dates, arithmetic, URLs).

The same bytes on every machine and Python version: only `Random(seed).randrange` and `.choice` are used, and nothing
depends on the clock, the locale or a hash. `GENERATED_SHA256` is the hash of the whole text.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from hashlib import sha256
from random import Random

from sae.text.documents import Document

SEED = 20_240_101
DOMAIN_CHARS = 800_000
DOCUMENT_CHARS = (1_000, 6_000)
GENERATED_SHA256 = "aa3d01420ef02802cb809059ee86e6df470d46def597391b75d2e704dcd132cc"

Maker = Callable[[Random], str]

WORDS = tuple(
    """
    amber anchor apple arrow basin birch bridge candle canyon cedar cloud copper coral crane delta ember falcon
    fern field flint forest garden glacier granite harbor hazel heron island ivory jasmine juniper lagoon lantern
    lark maple marble meadow mesa mirror moss north oak ocean olive orchid pebble pine planet prairie quartz raven
    reef ridge river robin saffron sage sierra silver sparrow spruce stone summit thistle timber tulip valley velvet
    violet walnut willow winter zephyr
    """.split()  # noqa: SIM905
)


def generate() -> Iterator[Document]:
    """Every generated document, domain by domain, about `DOMAIN_CHARS` characters (all ASCII) of each."""
    for number, (domain, makers) in enumerate(MAKERS.items()):
        rng = Random(SEED + number)
        made_chars = count = 0
        while made_chars < DOMAIN_CHARS:
            text = _document(rng, rng.choice(makers))
            yield Document(f"generated/{domain}/{count:04d}", text, domain, "generated")
            made_chars += len(text)
            count += 1


def generated_sha256() -> str:
    """SHA-256 over id, domain and text of all generated documents; equals `GENERATED_SHA256`."""
    digest = sha256()
    for document in generate():
        digest.update(f"{document.id}\0{document.domain}\0{document.text}\0".encode())
    return digest.hexdigest()


def _document(rng: Random, maker: Maker) -> str:
    """Blocks of one maker, until the document has the length drawn for it."""
    wanted_chars = rng.randrange(*DOCUMENT_CHARS)
    blocks: list[str] = []
    while wanted_chars > 0:
        blocks.append(maker(rng))
        wanted_chars -= len(blocks[-1]) + 1
    return "\n".join(blocks) + "\n"


def _raw(rng: Random, size: int) -> bytes:
    return rng.randrange(256**size).to_bytes(size, "big")


def _name(rng: Random) -> str:
    return f"{rng.choice(WORDS)}{rng.choice('-_')}{rng.choice(WORDS)}"


# --- dna -------------------------------------------------------------------------------------------------------------

QUADS = ["".join("ACGT"[byte >> shift & 3] for shift in (6, 4, 2, 0)) for byte in range(256)]
MOTIFS = ("TATAAA", "CCAAT", "GGGCGG", "AATAAA", "GAATTC", "CACGTG", "TTAGGGTTAGGG", "CAGCAGCAGCAG")


def _sequence(rng: Random, bases: int) -> str:
    """Uniform bases, a third of the sequences with a known motif: more to learn than the alphabet."""
    drawn = "".join(map(QUADS.__getitem__, _raw(rng, bases // 4 + 1)))
    if rng.randrange(3) == 0:
        at = rng.randrange(bases)
        drawn = drawn[:at] + rng.choice(MOTIFS) + drawn[at:]
    return drawn[:bases]


def _fasta(rng: Random) -> str:
    lines = [_sequence(rng, 60) for _ in range(rng.randrange(4, 18))]
    lines.append(_sequence(rng, rng.randrange(8, 60)))
    header = f">seq{rng.randrange(10**6):06d} {_name(rng)} chromosome {rng.randrange(1, 23)}"
    return f"{header} length={sum(map(len, lines))}\n" + "\n".join(lines)


def _genbank(rng: Random) -> str:
    """Numbered lines of six lower-case groups of ten bases."""
    lines = []
    for row in range(rng.randrange(4, 16)):
        bases = _sequence(rng, 60).lower()
        groups = " ".join(bases[i : i + 10] for i in range(0, 60, 10))
        lines.append(f"{row * 60 + 1:>9} {groups}")
    return "ORIGIN\n" + "\n".join(lines) + "\n//"


def _primers(rng: Random) -> str:
    return f"{_name(rng)}\t5'-{_sequence(rng, rng.randrange(18, 28))}-3'\tTm={rng.randrange(520, 680) / 10:.1f}"


# --- base64 ----------------------------------------------------------------------------------------------------------


def _base64(rng: Random, size: int) -> str:
    return base64.b64encode(_raw(rng, size)).decode("ascii")


def _wrapped(encoded: str, width: int) -> str:
    return "\n".join(encoded[i : i + width] for i in range(0, len(encoded), width))


def _mime_part(rng: Random) -> str:
    kind = rng.choice(("application/octet-stream", "image/png", "application/zip", "audio/ogg"))
    head = f"Content-Type: {kind}\nContent-Transfer-Encoding: base64\n\n"
    return head + _wrapped(_base64(rng, rng.randrange(200, 1200)), 76) + "\n"


def _armoured(rng: Random) -> str:
    label = rng.choice(("DATA", "BLOCK", "MESSAGE", "SAMPLE"))
    body = _wrapped(_base64(rng, rng.randrange(150, 900)), 64)
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----"


def _data_url(rng: Random) -> str:
    kind = rng.choice(("image/png", "image/gif", "font/woff2", "text/plain"))
    return f'<img src="data:{kind};base64,{_base64(rng, rng.randrange(60, 400))}" alt="{_name(rng)}">'


def _json_payload(rng: Random) -> str:
    return f'{{"name": "{_name(rng)}", "payload": "{_base64(rng, rng.randrange(24, 200))}"}}'


# --- hex -------------------------------------------------------------------------------------------------------------


def _checksum(rng: Random) -> str:
    return f"{_raw(rng, 32).hex()}  {_name(rng)}.{rng.choice(('tar.gz', 'zip', 'whl', 'iso', 'bin'))}"


def _hex_dump(rng: Random) -> str:
    start = rng.randrange(1 << 16) * 16
    lines = []
    for row in range(rng.randrange(4, 24)):
        raw = _raw(rng, 16)
        seen = "".join(chr(b) if 32 <= b < 127 else "." for b in raw)
        lines.append(f"{start + 16 * row:08x}  {raw[:8].hex(' ')}  {raw[8:].hex(' ')}  |{seen}|")
    return "\n".join(lines)


def _colours(rng: Random) -> str:
    rule = rng.choice(("color", "background", "border-color", "fill", "stroke", "outline-color"))
    return f".{_name(rng)} {{ {rule}: #{_raw(rng, 3).hex()}; }}"


def _uuid(rng: Random) -> str:
    raw = _raw(rng, 16).hex()
    variant = rng.choice("89ab")
    uuid = f"{raw[:8]}-{raw[8:12]}-4{raw[13:16]}-{variant}{raw[17:20]}-{raw[20:]}"
    return f"{rng.choice(('id', 'uuid', 'request', 'session'))}: {uuid}"


def _addresses(rng: Random) -> str:
    low = rng.randrange(1 << 36) * 4096
    pages = rng.randrange(1, 512)
    return f"0x{low:012X}-0x{low + pages * 4096:012X} {_name(rng)} flags=0x{rng.randrange(1 << 16):04X}"


# --- dates -----------------------------------------------------------------------------------------------------------

# English names, because strftime would use the machine's locale.
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
MONTH_NAMES = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
EVENTS = (
    "started",
    "stopped",
    "connected",
    "timed out",
    "retrying",
    "finished",
    "reloaded",
    "rotated",
    "accepted",
    "closed",
)


def _moment(rng: Random) -> datetime:
    return datetime(1970, 1, 1) + timedelta(seconds=rng.randrange(80 * 365 * 86_400))


def _rfc_2822(when: datetime, offset: str) -> str:
    day = f"{WEEKDAYS[when.weekday()]}, {when.day:02d} {MONTHS[when.month - 1]} {when.year}"
    return f"{day} {when:%H:%M:%S} {offset}"


def _iso_line(rng: Random) -> str:
    zone = rng.choice(("Z", "+00:00", "+02:00", "-05:00", "+09:00"))
    return f"{rng.choice(WORDS)}: {_moment(rng).isoformat()}{zone}"


def _mail_line(rng: Random) -> str:
    field = rng.choice(("Date", "Received", "Last-Modified", "Expires"))
    return f"{field}: {_rfc_2822(_moment(rng), rng.choice(('+0000', '+0100', '-0800', 'GMT')))}"


def _log_lines(rng: Random) -> str:
    """Log lines with increasing timestamps."""
    when, lines = _moment(rng), []
    for _ in range(rng.randrange(5, 25)):
        when += timedelta(milliseconds=rng.randrange(1, 90_000))
        stamp = f"{when:%Y-%m-%d %H:%M:%S},{when.microsecond // 1000:03d}"
        level = rng.choice(("DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR"))
        lines.append(f"{stamp} {level:<7} {_name(rng)}[{rng.randrange(100, 9999)}]: {rng.choice(EVENTS)}")
    return "\n".join(lines)


def _spoken_date(rng: Random) -> str:
    when = _moment(rng)
    month = MONTH_NAMES[when.month - 1]
    day = rng.choice((f"{month} {when.day}, {when.year}", f"{when.day} {month} {when.year}"))
    return f"The {rng.choice(WORDS)} {rng.choice(EVENTS)} on {day} at {when:%H:%M}."


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _whole(rng: Random) -> int:
    """A number of one to four digits; each upper limit (10, 100, 1,000, 10,000) is equally likely."""
    return rng.randrange(10 ** rng.randrange(1, 5))


def _sum(rng: Random) -> str:
    a, b = _whole(rng), _whole(rng)
    return f"{a} + {b} = {a + b}" if rng.randrange(2) else f"{a} - {b} = {a - b}"


def _product(rng: Random) -> str:
    a, b = rng.randrange(2, 100), rng.randrange(2, 100)
    return f"{a} * {b} = {a * b}" if rng.randrange(2) else f"{a * b} / {b} = {a}"


def _equation(rng: Random) -> str:
    unknown, a, x, b = rng.choice("xyzn"), rng.randrange(2, 20), rng.randrange(-30, 60), rng.randrange(1, 90)
    return f"{a}{unknown} + {b} = {a * x + b}  =>  {a}{unknown} = {a * x}  =>  {unknown} = {x}"


def _column_sum(rng: Random) -> str:
    terms = [_whole(rng) for _ in range(rng.randrange(2, 6))]
    body = "\n".join(f"{term:>8}" for term in terms)
    return f"{body}\n{'-' * 8}\n{sum(terms):>8}\n"


def _division(rng: Random) -> str:
    a, b = _whole(rng), rng.randrange(2, 60)
    return f"{a} = {b} * {a // b} + {a % b}; {a} mod {b} = {a % b}"


# --- urls ------------------------------------------------------------------------------------------------------------

# Names reserved for documentation (RFC 2606), so no address belongs to anyone.
HOSTS = ("example.com", "example.org", "example.net", "test.example", "invalid.example")


def _url(rng: Random) -> str:
    path = "/".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 5)))
    url = f"{rng.choice(('https', 'https', 'http', 'ftp'))}://{rng.choice(WORDS)}.{rng.choice(HOSTS)}/{path}"
    url += rng.choice(("", "/", ".html", ".pdf", ".json", "/index.html"))
    if rng.randrange(2):
        pairs = (f"{rng.choice(WORDS)}={rng.choice((rng.choice(WORDS), str(_whole(rng))))}" for _ in range(3))
        url += "?" + "&".join(pairs)
    return url + (f"#{rng.choice(WORDS)}" if rng.randrange(5) == 0 else "")


def _html_link(rng: Random) -> str:
    return f'<a href="{_url(rng)}">{rng.choice(WORDS)} {rng.choice(WORDS)}</a>'


def _access_line(rng: Random) -> str:
    method, status = rng.choice(("GET", "GET", "POST", "HEAD")), rng.choice((200, 200, 301, 404, 500))
    return f'"{method} {_url(rng)} HTTP/1.1" {status} {_whole(rng)}'


def _markdown_link(rng: Random) -> str:
    return f"- [{rng.choice(WORDS)} {rng.choice(WORDS)}]({_url(rng)})"


MAKERS: dict[str, tuple[Maker, ...]] = {
    "dna": (_fasta, _fasta, _genbank, _primers),
    "base64": (_mime_part, _armoured, _data_url, _json_payload),
    "hex": (_checksum, _hex_dump, _colours, _uuid, _addresses),
    "dates": (_iso_line, _mail_line, _log_lines, _spoken_date),
    "arithmetic": (_sum, _product, _equation, _column_sum, _division),
    "urls": (_url, _html_link, _access_line, _markdown_link),
}
