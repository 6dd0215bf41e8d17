import os
import zipfile

import pytest

from data_prep.scan import packed_files
from data_prep.scan.archives import Source, Unreadable, list_sources, read_bytes, will_read
from data_prep.scan.reasons import REASONS
from data_prep.system.errors import InputError


def listing(folder):
    entries = list(list_sources(folder))
    assert all(entry.reason in REASONS for entry in entries if isinstance(entry, Unreadable))
    return entries


def reasons(folder):
    return {
        (entry.source.path, entry.source.member): entry.reason
        for entry in listing(folder)
        if isinstance(entry, Unreadable)
    }


def test_any_tree_in_a_fixed_order(tmp_path):
    for name in ("b/2", "a", "b/1.txt", "c/d/e/f", "B"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    assert listing(tmp_path) == [
        Source("B", "", 1),
        Source("a", "", 1),
        Source("b/1.txt", "", 7),
        Source("b/2", "", 3),
        Source("c/d/e/f", "", 7),
    ]
    assert [read_bytes(tmp_path, source) for source in listing(tmp_path)] == [
        b"B",
        b"a",
        b"b/1.txt",
        b"b/2",
        b"c/d/e/f",
    ]


def test_zip_members_whatever_the_zip_is_called(tmp_path):
    with zipfile.ZipFile(tmp_path / "scan", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z/2", b"two" * 1000)
        archive.writestr("z/1", b"one")
        archive.mkdir("empty")
    assert listing(tmp_path) == [Source("scan", "z/1", 3), Source("scan", "z/2", 3000)]
    assert [read_bytes(tmp_path, source) for source in listing(tmp_path)] == [b"one", b"two" * 1000]


def test_zip_file_that_changed_is_opened_again(tmp_path):
    for content in (b"first", b"second, longer"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("m", content)
        assert read_bytes(tmp_path, listing(tmp_path)[0]) == content


def test_suspicious_zip_members_are_left_and_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside", b"x")
        archive.writestr("/etc/passwd", b"x")
        archive.writestr("inner.zip", b"x")
        archive.writestr("bomb", bytes(40 << 20))
        archive.writestr("good", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("good", b"y")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    assert reasons(tmp_path) == {
        ("a.zip", "../outside"): "outside_archive",
        ("a.zip", "/etc/passwd"): "outside_archive",
        ("a.zip", "inner.zip"): "nested_zip",
        ("a.zip", "bomb"): "too_large",
        ("a.zip", "good"): "bad_zip",
        ("broken.zip", ""): "bad_zip",
    }
    assert [entry for entry in listing(tmp_path) if isinstance(entry, Source)] == [
        Source("a.zip", "good", 1)
    ]


def test_members_that_are_small_one_by_one_and_huge_together(tmp_path, monkeypatch):
    """None passes the limit of a single member; the zip file is refused as a whole, before anything
    is expanded."""
    monkeypatch.setattr(packed_files, "_TOTAL_FREE_BYTES", 2 << 20)
    for name, size in (("bomb.zip", 150_000), ("small.zip", 100_000)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(20):
                archive.writestr(f"{number:02d}", bytes(size))
    (detail,) = (entry.detail for entry in listing(tmp_path) if isinstance(entry, Unreadable))
    assert reasons(tmp_path) == {("bomb.zip", ""): "too_large"}
    assert detail == (
        f"its 20 members expand {(tmp_path / 'bomb.zip').stat().st_size} to 3000000 bytes"
    )
    assert sum(isinstance(entry, Source) for entry in listing(tmp_path)) == 20


def test_incompressible_members_have_no_total_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_files, "_TOTAL_FREE_BYTES", 0)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(str(number), os.urandom(1000))
    assert reasons(tmp_path) == {}


def _with_entries(path, content: bytes, entries: list[tuple[str, int]]) -> None:
    """A zip file of one stored member; `entries` of its directory are added: (name, offset of the
    local header)."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", content)
        for name, offset in entries:
            entry = zipfile.ZipInfo(name)
            entry.header_offset, entry.file_size, entry.compress_size = offset, 5, 5
            entry.CRC = zipfile.crc32(b"inner")
            archive.filelist.append(entry)


@pytest.mark.parametrize("quoted", [False, True])
def test_members_that_share_bytes_are_refused(tmp_path, quoted):
    """Many names for the same bytes, or a member within another: the way to a bomb whose members
    are all modest."""
    with zipfile.ZipFile(tmp_path / "inner", "w") as archive:
        archive.writestr("b", b"inner")
    inner = (tmp_path / "inner").read_bytes()
    (tmp_path / "inner").unlink()
    header_and_name = 31
    entries = [("b", header_and_name)] if quoted else [("b", 0), ("c", 0)]
    _with_entries(tmp_path / "a.zip", inner, entries)
    expected = {("a.zip", name): "bad_zip" for name in ("a", *(name for name, _ in entries))}
    assert reasons(tmp_path) == expected
    assert len(listing(tmp_path)) == len(expected)


def test_a_member_that_runs_into_the_directory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"content")
        archive.writestr("b", b"content")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    at = data.rindex(b"PK\x01\x02") + 20
    # Compressed Size, by which its ratio would look modest
    data[at : at + 4] = (500).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    assert reasons(tmp_path) == {("a.zip", "b"): "bad_zip"}


def test_a_zip_file_within_a_zip_file_is_not_opened_whatever_its_name(tmp_path):
    """So a zip file that holds itself ends at once."""
    with zipfile.ZipFile(tmp_path / "inner", "w") as archive:
        archive.writestr("scan", b"x")
    with zipfile.ZipFile(tmp_path / "outer", "w") as archive:
        archive.write(tmp_path / "inner", "r.zip")
        archive.write(tmp_path / "inner", "r.dcm")
    (tmp_path / "inner").unlink()
    first, second = listing(tmp_path)
    assert first.member == "r.dcm" and is_zip_content(read_bytes(tmp_path, first))
    assert (second.source.member, second.reason) == ("r.zip", "nested_zip")


def is_zip_content(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")


@pytest.mark.parametrize(
    "name",
    ["C:\\x", "C:x", "c:/x", "\\\\server\\share\\x", "//server/share/x", "a\\..\\..\\x", "\\x"],
)
def test_member_names_that_lead_outside_on_any_system_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
        archive.writestr("1.2.840:5/a..b", b"x")  # names that are only similar
    assert list(reasons(tmp_path).values()) == ["outside_archive"]
    assert Source("a.zip", "1.2.840:5/a..b", 1) in listing(tmp_path)


@pytest.mark.parametrize("name", ["?x", "good?/../../etc/passwd", "a?b", "?"])
@pytest.mark.parametrize("control", ["\0", "\n", "\r", "\x1b", "\x7f"])
def test_control_characters_in_member_names_are_refused(tmp_path, name, control):
    """NUL ends a name for zipfile: `good\\0/../..` would be taken as `good`, and `\\0x` as the zip
    file itself."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("m", b"x")
        archive.writestr(name.replace("?", "0"), b"y")
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(
        data.replace(name.replace("?", "0").encode(), name.replace("?", control).encode())
    )
    refused = reasons(tmp_path)
    assert list(refused.values()) == ["bad_zip"]
    assert all(member.startswith("member ") for _, member in refused)
    assert Source("a.zip", "m", 1) in listing(tmp_path)


def test_encrypted_member(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("m", b"secret")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # local header's flags
    data[data.index(b"PK\x01\x02") + 8] |= 1  # central directory's flags
    (tmp_path / "a.zip").write_bytes(data)
    assert reasons(tmp_path) == {("a.zip", "m"): "encrypted"}


def test_damaged_member_is_an_os_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m", os.urandom(1000))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[100] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(OSError, match=r"a\.zip: m: damaged member"):
        read_bytes(tmp_path, listing(tmp_path)[0])


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damage_anywhere_in_a_member_is_an_os_error(tmp_path, compression):
    """One byte changed at a time, everywhere before the central directory: the local header and the
    data."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m", b"0123456789" * 10)
    good = path.read_bytes()
    damaged = 0
    for place in range(good.index(b"PK\x01\x02")):
        for flip in (0x01, 0x10, 0xFF):
            data = bytearray(good)
            data[place] ^= flip
            path.write_bytes(data)
            os.utime(path, ns=(0, 3 * place + flip))
            try:
                content = read_bytes(tmp_path, Source("a.zip", "m", 100))
            except OSError as error:
                assert "a.zip: m: damaged member" in str(error)
                damaged += 1
            else:
                assert content == b"0123456789" * 10
    assert damaged > 40


@pytest.mark.parametrize("method", [1, 96, 0xFFFF])
def test_unknown_compression_is_an_os_error(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("m", b"content")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    place = data.index(b"PK\x01\x02") + 10
    data[place : place + 2] = method.to_bytes(2, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(OSError, match=r"a\.zip: m: damaged member"):
        read_bytes(tmp_path, listing(tmp_path)[0])


def test_damage_anywhere_in_the_directory_of_a_zip_file(tmp_path):
    """Whatever byte of the central directory is changed, listing ends and every member is read or
    named."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m", b"content")
    good = path.read_bytes()
    for place in range(good.index(b"PK\x01\x02"), len(good)):
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(good)
            data[place] ^= flip
            path.write_bytes(data)
            os.utime(path, ns=(0, 3 * place + flip))
            for entry in listing(tmp_path):
                if isinstance(entry, Source):
                    try:
                        read_bytes(tmp_path, entry)
                    except OSError:
                        pass


def test_links_cannot_loop_nor_leave(tmp_path):
    inside = tmp_path / "archive"
    (inside / "a").mkdir(parents=True)
    (inside / "a" / "file").write_bytes(b"x")
    (tmp_path / "outside").write_bytes(b"x")
    (inside / "a" / "up").symlink_to(inside)
    (inside / "away").symlink_to(tmp_path / "outside")
    (inside / "itself").symlink_to(inside / "itself")
    (inside / "one").symlink_to(inside / "other")
    (inside / "other").symlink_to("one")
    (inside / "nowhere").symlink_to(inside / "missing")
    (inside / "same").symlink_to(inside / "a" / "file")
    os.mkfifo(inside / "pipe")
    left_out = reasons(inside)
    assert {path for path, _ in left_out} == {
        "a/up",
        "away",
        "itself",
        "nowhere",
        "one",
        "other",
        "pipe",
    }
    assert left_out["a/up", ""] == left_out["away", ""] == "outside_archive"
    assert [entry.path for entry in listing(inside) if isinstance(entry, Source)] == [
        "a/file",
        "same",
    ]


def test_names_that_are_no_utf8_are_read(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff\xfe", "wb") as file:
        file.write(b"x")
    (source,) = listing(tmp_path)
    assert source == Source("\udcff\udcfe", "", 1) and read_bytes(tmp_path, source) == b"x"


def test_no_such_directory(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        list(list_sources(tmp_path / "missing"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file: is a file, not a directory"):
        list(list_sources(tmp_path / "file"))


def test_reading_ahead_changes_nothing_and_minds_nothing(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"x" * 100)
    os.mkfifo(tmp_path / "pipe")
    names = [("scan.dcm", ""), ("gone.dcm", ""), ("pipe", ""), ("scan.dcm", "member")]
    will_read(tmp_path, [Source(path, member, 100) for path, member in names])
    will_read(tmp_path, [Source("scan.dcm", "", 100)], num_bytes=10)
    assert read_bytes(tmp_path, Source("scan.dcm", "", 100)) == b"x" * 100
