"""The forms of a manifest: each gives the same items; what is wrong is named, and nothing but a UserError ever comes out."""
import csv
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.manifest import KEYS, READERS, below, parse_item, read_items
from data_pipelines.problems import Problems
from vino_jax.batch import TASKS
from vino_jax.errors import UserError

ENTRIES = [
    {"task": "t2i", "target": "a.png", "long": ["One text.", "Another, with \"quotes\"."], "short": "short"},
    {"task": "ti2i_baseimg", "target": "sub/b.jpg", "images": ["a.png", "sub/b.jpg"], "instruction": "Add it, please.", "base_image": False},
    {"task": "tv2v", "target": "c.mp4", "video": "c.mp4", "instruction": "Umlaute: äöü, 猫.", "id": "the clip"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Files of the right names; nothing reads what is in them."""
    root = tmp_path_factory.mktemp("root")
    (root / "sub").mkdir()
    for name in ("a.png", "sub/b.jpg", "c.mp4"):
        (root / name).write_bytes(name.encode())
    return root


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write(form, folder, root):
    path = folder / f"manifest{form}"
    if form == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ENTRIES)))
    elif form == ".csv":
        with path.open("w", newline="") as stream:
            rows = csv.DictWriter(stream, KEYS)
            rows.writeheader()
            rows.writerows([{k: json.dumps(v) if isinstance(v, list | bool) else v for k, v in e.items()} for e in ENTRIES])
    elif form == ".parquet":
        rows = [{**e, "long": e.get("long", None)} for e in ENTRIES]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{key: row.get(key) for key in KEYS} for row in rows]), path)
    elif form == ".tar":
        with tarfile.open(path, "w") as archive:
            for name in ("a.png", "sub/b.jpg", "c.mp4"):
                add(archive, name, (root / name).read_bytes())
            for number, entry in enumerate(ENTRIES):
                add(archive, f"{number}.json", json.dumps(entry).encode())
    return path


@pytest.mark.parametrize("form", READERS)
def test_each_form_gives_the_same_items(form, root, tmp_path):
    wheres, items = zip(*read_items(write(form, tmp_path, root), root, Problems()), strict=True)
    a, b, c = items
    assert [i.task for i in items] == ["t2i", "ti2i_baseimg", "tv2v"] and [i.id for i in items] == ["a.png", "sub/b.jpg", "the clip"]
    assert a.texts == {"long": ("One text.", "Another, with \"quotes\"."), "short": ("short",)} and not a.images and a.video is None
    assert b.base_image is False and [m.read_bytes() for m in b.images] == [b"a.png", b"sub/b.jpg"]
    assert b.target.read_bytes() == b"sub/b.jpg" and c.video.read_bytes() == b"c.mp4" and c.texts == {"instruction": ("Umlaute: äöü, 猫.",)}
    assert len(set(wheres)) == 3 and all(str(tmp_path) in where for where in wheres)


def test_folders_of_media_and_captions(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("x.mp4", "deep/y.PNG", "notes.md", "z.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "x.txt").write_text(" A clip.\n")
    (tmp_path / "deep" / "y.txt").write_text("A picture.")
    problems = Problems(tmp_path / "skipped.jsonl")
    items = [item for _, item in read_items(tmp_path, "anywhere", problems)]
    assert [(i.task, i.id, i.texts) for i in items] == [("t2i", "deep/y.PNG", {"long": ("A picture.",)}), ("t2v", "x.mp4", {"long": ("A clip.",)})]
    assert [json.loads(line)["problem"] for line in problems.listed()] == ["its caption file z.txt is missing"]
    with pytest.raises(UserError, match="z.jpg: its caption file z.txt is missing"):
        read_items(tmp_path, "anywhere", Problems())


def test_webdataset_shards(tmp_path):
    """Members of one stem are an item; a json of theirs may name them without it. Several tars of a folder are one manifest."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("1.jpg", b"one"), ("1.txt", b"First."), ("2.json", b'{"task": "ti2i", "target": "target.png", "images": ["0.png"], '
                           b'"instruction": "Do."}'), ("2.target.png", b"t"), ("2.0.png", b"r"), ("3.mp4", b"no caption")):
            add(archive, name, data)
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        add(archive, "d/1.mp4", b"clip")
        add(archive, "d/1.txt", b"A clip.")
    problems = Problems(tmp_path / "skipped.jsonl")
    second, first, third = (item for _, item in read_items(tmp_path, ".", problems))
    assert first.target.read_bytes() == b"one" and first.texts == {"long": ("First.",)}
    assert second.task == "ti2i" and second.target.read_bytes() == b"t" and second.images[0].read_bytes() == b"r"
    assert third.task == "t2v" and third.target.read_bytes() == b"clip" and third.target.name == "d/1.mp4"
    assert json.loads(problems.listed()[0]) == {"item": f"{tmp_path / '0.tar'}:3.mp4", "problem": "its caption file 3.txt is missing"}


def test_a_tar_that_is_not_whole_is_told(tmp_path):
    """For tarfile a damaged header, or an end between two members, is the end of the archive."""
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        for i in range(2):
            add(archive, f"{i}.png", b"x" * 600)  # a header of 512 bytes, then two blocks
            add(archive, f"{i}.txt", b"text")  # and two blocks of this
    whole = (tmp_path / "m.tar").read_bytes()
    assert len(read_items(tmp_path / "m.tar", ".", Problems())) == 2
    flipped = bytearray(whole)
    flipped[2560 + 5] ^= 255
    for broken in (whole[:700], whole[:2560], whole[:2560 + 512 + 100], bytes(flipped)):
        (tmp_path / "m.tar").write_bytes(broken)
        with pytest.raises(UserError, match="damaged or cut off at byte 2560|cannot read the manifest"):
            read_items(tmp_path / "m.tar", ".", Problems())
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        add(archive, "0.png", b"x")
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
    with pytest.raises(UserError, match="has the member 1.png, which is a link"):
        read_items(tmp_path / "m.tar", ".", Problems())


def test_captions_without_a_picture_are_told(tmp_path):
    """So a suffix that is not known drops nothing."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x.avif").write_bytes(b"")
    (tmp_path / "linked" / "x.txt").write_bytes(b"\xef\xbb\xbfA caption.")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more").symlink_to(tmp_path / "linked")
    with pytest.raises(UserError, match="more/x.txt: the caption x.txt has no picture or clip beside it; known: .png"):
        read_items(tmp_path / "data", ".", Problems())
    (tmp_path / "linked" / "x.webp").write_bytes(b"")
    ((_, item),) = read_items(tmp_path / "data", ".", Problems())
    assert item.texts == {"long": ("A caption.",)} and item.id == "more/x.webp"
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        add(archive, "x.avif", b"x")
        add(archive, "x.txt", b"A caption.")
        add(archive, "y.json", b'{"task": "t2i", "target": "x.avif", "long": "caf\xe9"}')
    problems = Problems(tmp_path / "skipped.jsonl")
    assert not read_items(tmp_path / "m.tar", ".", problems)
    assert ["is not UTF-8" in line or "x.txt has no picture" in line for line in problems.listed()] == [True, True]


def test_paths_stay_below_the_root(root, tmp_path):
    for name in ("../x", "sub/../../x", "/etc/hosts", str(tmp_path / "a.png"), "sub/../..", ".."):
        with pytest.raises(UserError, match="leads out of the data root"):
            below(root, name)
    for name in ("none", "sub", "", "a.png/b", "x" * 5000, "nul\0byte"):
        with pytest.raises(UserError, match="there is no file"):
            below(root, name)
    assert below(root, "sub/../a.png").read_bytes() == b"a.png" and below(root, str(root / "a.png")).read_bytes() == b"a.png"
    (root / "link.png").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"mounted")
    assert below(root, "link.png").read_bytes() == b"mounted"  # data is often linked in from another disk
    (root / "link.png").unlink()


@pytest.mark.parametrize("entry, message", [
    ({"task": "t2i", "target": "a.png", "long": "  \n"}, "no text: give at least one of"),
    ({"task": "t2i", "target": "a.png", "long": []}, "no text"),
    ({"task": "t2i", "target": "a.png", "long": ["a", 3]}, "'long' must be a string or"),
    ({"task": "tv2v", "target": "c.mp4", "video": ["c.mp4", "c.mp4"], "short": "x"}, "'video' is a list of 2: at most one reference clip"),
    ({"task": "t2i", "target": "a.png", "short": "\ud800"}, "half of a surrogate pair"),
    ({"task": "t2i", "target": "../a.png", "short": "x"}, "the path ../a.png leads out of the data root"),
    ("[" * 100000, "not JSON that can be read"), ('{"task": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ('{"task": "t2i", "target": "a.png", "target": "c.png", "short": "x"}', "the key 'target' stands there twice"),
    ({"task": "ti2i", "target": "a.png", "short": "x", "base_image": "yes"}, "'base_image' must be true or false"),
])
def test_what_is_wrong_is_named(root, entry, message):
    with pytest.raises(UserError, match=message):
        parse_item(entry, lambda name: below(root, name))


@pytest.mark.parametrize("name, data, message", [
    ("m.txt", b"x", "neither a folder nor a .jsonl, .csv"),
    ("m.jsonl", b"\xff\xfe", "cannot read the manifest"), ("m.jsonl", b" \n", "has no items"),
    ("m.csv", b"", "has no items"), ("m.parquet", b"PAR1nothing", "cannot read the manifest"), ("none.csv", None, "cannot read the manifest"),
    ("m.csv", b"task,target,short\nt2i,a.png,x,more", "m.csv:2: unknown key 'cells without a column'"),
    ("m.csv", b'task,target,short\nt2i,a.png,"unclosed\nt2i,a.png,blue\n', "cannot read the manifest .*near line"),
    ("m.csv", b"task,target,short,short\nt2i,a.png,x,y", "a column twice"),
    ("m.csv", b"task,target,images,short\nti2i,a.png,[1],x", "m.csv:2: 'images' must be a list of strings"),
])
def test_a_manifest_that_is_none_is_told(root, tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_items(tmp_path / name, root, Problems())


def test_a_problem_is_listed_once_or_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="^line 3: it is broken$"), Problems().of("line 3"):
        raise UserError("it is broken")
    for _ in range(2):  # two runs, or two processes
        problems = Problems(tmp_path / "skipped.jsonl")
        for _ in range(2):
            with problems.of("line 3"):
                raise UserError("it is\nbroken")
    assert [json.loads(line) for line in problems.listed()] == [{"item": "line 3", "problem": "it is\nbroken"}]
    with pytest.raises(ZeroDivisionError), problems.of("line 4"):
        raise ZeroDivisionError  # a bug is no bad item


VALUES = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text() | st.sampled_from(["a.png", "c.mp4", *TASKS]),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)
ENTRY = st.dictionaries(st.sampled_from([*KEYS, "other"]), VALUES, max_size=9)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(entry=st.one_of(VALUES, ENTRY, ENTRY.map(lambda e: {"task": "t2i", "target": "a.png", "long": "x", **e}), st.text()))
@example(entry={"task": "t2i", "target": "a.png", "long": "x"})
def test_any_entry_is_an_item_or_told(root, entry):
    try:
        item = parse_item(entry, lambda name: below(root, name))
    except UserError as error:
        assert str(error)
        return
    assert item.task in TASKS and item.target.is_file() and item.texts and all(t.strip() for texts in item.texts.values() for t in texts)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(form=st.sampled_from([*READERS]), data=st.binary(max_size=300), at=st.floats(0, 1), keep=st.booleans())
def test_any_bytes_are_a_manifest_or_told(root, tmp_path, form, data, at, keep):
    """Bytes anywhere in a right manifest, or alone."""
    path = write(form, tmp_path, root)
    whole = path.read_bytes()
    place = int(at * len(whole))
    path.write_bytes(whole[:place] + data + whole[place + len(data) * keep:])
    try:
        items = read_items(path, root, Problems(tmp_path / "skipped.jsonl"))
    except UserError:
        return
    assert all(item.texts and item.task in TASKS for _, item in items)


def test_pictures_are_no_captions(tmp_path):
    """A caption that is no text is told, and a picture beside it stays out."""
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="x.png: its caption file x.txt is not UTF-8"):
        read_items(tmp_path, ".", Problems())
