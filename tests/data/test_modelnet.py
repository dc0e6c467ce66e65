"""ModelNet40's pickle: read as arrays, and nothing in it ever run."""

import builtins
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointalign.data.modelnet import CLASS_NAMES, load_modelnet40
from pointalign.errors import DataError

LABELS = [0, 39, 8]


@pytest.fixture
def clouds():
    generator = np.random.default_rng(0)
    return [generator.standard_normal((count, 6)).astype(np.float32) for count in (20, 20, 7)]


@pytest.fixture
def load(tmp_path):
    """From pickled bytes to what is read of them."""

    def read(content):
        path = tmp_path / "modelnet.dat"
        path.write_bytes(content)
        return load_modelnet40(path)

    return read


def refused(load, content):
    with pytest.raises(DataError) as error:
        load(content)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_right(objects, clouds):
    assert [thing.id for thing in objects] == [0, 1, 2]
    assert [thing.class_index for thing in objects] == LABELS
    assert [thing.label for thing in objects] == ["airplane", "xbox", "chair"]
    for thing, cloud in zip(objects, clouds, strict=True):
        assert thing.xyz.dtype == thing.points.dtype == np.float32
        assert np.array_equal(thing.xyz, cloud[:, :3].astype(np.float32))
        assert np.array_equal(thing.points[:, :3], thing.xyz)
        assert not thing.points[:, 3:].any()


def test_the_classes_are_the_published_ones():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 40
    assert [CLASS_NAMES[index] for index in (0, 9, 10, 15, 19, 23, 28, 29, 30, 36, 39)] == [
        *(
            "airplane",
            "cone",
            "cup",
            "flower pot",
            "lamp",
            "night stand",
            "range hood",
            "sink",
            "sofa",
            "tv stand",
            "xbox",
        )
    ]


LABEL_FORMS = {
    "ints": list,
    "numpy ints": lambda labels: [np.int64(label) for label in labels],
    "small numpy ints": lambda labels: [np.uint8(label) for label in labels],
    "arrays of one": lambda labels: [np.array([label], dtype=np.int32) for label in labels],
    "arrays of none": lambda labels: [np.array(label) for label in labels],
    "one array": np.array,
    "one column": lambda labels: np.array(labels)[:, None],
    "tuple": tuple,
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", LABEL_FORMS)
def test_every_protocol_and_form_of_label(load, clouds, protocol, form):
    assert_right(load(pickle.dumps((clouds, LABEL_FORMS[form](LABELS)), protocol)), clouds)


@pytest.mark.parametrize("protocol", range(6))
def test_every_layout_of_arrays(load, clouds, protocol):
    forms = [np.asfortranarray(clouds[0]), clouds[1].astype(">f8"), clouds[2][::-1]]
    assert_right(load(pickle.dumps([tuple(forms), LABELS], protocol)), forms)
    stacked = np.stack([*clouds[:2], clouds[0]])
    assert_right(load(pickle.dumps([stacked, LABELS], protocol)), stacked)
    stacked.flags.writeable = False
    assert_right(load(pickle.dumps([stacked, LABELS], protocol)), stacked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("protocol", range(6))
def test_the_names_of_numpy_1_and_2(load, clouds, protocol, tmp_path, monkeypatch):
    named = pickle.whichmodule
    content = (clouds, [np.int64(label) for label in LABELS])
    for core in ("numpy.core", "numpy._core"):
        monkeypatch.setattr(
            pickle, "whichmodule", lambda thing, name, core=core: named(thing, name).replace("numpy._core", core)
        )
        path = tmp_path / f"{core}.pickle"
        with path.open("wb") as file:
            pickle._Pickler(file, protocol).dump(content)
        assert core.encode() in path.read_bytes()
        assert_right(load(path.read_bytes()), clouds)


def test_what_python_2_wrote(load, clouds):
    """Its strings are the arrays' bytes."""

    def array(values):
        raw = values.tobytes()
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K"
            + bytes([len(values)])
            + b"K\x06tcnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbI00\nT"
            + struct.pack("<i", len(raw))
            + raw
            + b"tb"
        )

    labels = b"".join(b"K" + bytes([label]) for label in LABELS)
    assert_right(load(b"\x80\x02(](" + b"".join(map(array, clouds)) + b"e](" + labels + b"et."), clouds)


class Call:
    """Pickled, this is a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Arrays(np.ndarray):
    """A type of array of one's own."""


def attacks(mark):
    """Contents that leave a mark when they are unpickled the plain way, and harmless ones that have no part here."""
    touch = f"touch {mark}"
    make = Call(os.mkdir, mark)
    inside = np.empty(1, dtype=object)
    inside[0] = make
    structure = np.zeros(2, dtype=[("a", "f4")])
    return {
        "os.system": Call(os.system, touch),
        "subprocess": Call(subprocess.call, ["touch", mark]),
        "eval": Call(builtins.eval, f"__import__('os').mkdir({mark!r})"),
        "exec": Call(builtins.exec, f"import os; os.mkdir({mark!r})"),
        "getattr": Call(getattr, make, "append"),
        "open": Call(builtins.open, mark, "w"),
        "beside the clouds": ([np.zeros((2, 6)), make], [1, 2]),
        "as a label": ([np.zeros((2, 6))], [make]),
        "in an array of objects": ([inside], [0]),
        "behind the lists": ([np.zeros((2, 6))], [0], make),
        "structured array": ([structure], [0]),
        "own type": ([np.zeros((2, 6)).view(Arrays)], [0]),
        "array of text": ([np.full((2, 6), "x")], [0]),
        "date": ([np.zeros((2, 6), dtype="M8[s]")], [0]),
        "set": ([np.zeros((2, 6))], {1, 2, make}),
        "encode": Call(__import__("_codecs").encode, "cat", "rot13"),
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", attacks(""))
def test_nothing_that_a_pickle_asks_for_is_run(load, tmp_path, name, protocol):
    mark = tmp_path / "mark"
    message = refused(load, pickle.dumps(attacks(str(mark))[name], protocol))
    assert not mark.exists()
    assert "asks for" in message
    assert "nothing of it was run" in message


def test_the_attacks_would_work(tmp_path):
    """Else the test above shows nothing."""
    for index, name in enumerate(("os.system", "eval", "in an array of objects", "as a label")):
        mark = tmp_path / str(index)
        pickle.loads(pickle.dumps(attacks(str(mark))[name]))
        assert mark.exists()


HAND_MADE = {
    "a path through an admitted module": b"\x80\x04\x8c\x05numpy\x8c\x10f2py.os.getcwd__\x93)R.",
    "attributes of an admitted type": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93)R.",
    "old style instance": b"(S'true'\nios\nsystem\n.",
    "admitted function given a state": b"c_codecs\nencode\n}(U\x01aK\x01ub.",
    "admitted function changed": b"c_codecs\nencode\n(NNtb.",
    "admitted function given attributes": b"c_codecs\nencode\n(N}U\x01aK\x01stb.",
    "the array type called": b"\x80\x02cnumpy\nndarray\n(K\x05tR.",
    "the array type made": b"\x80\x02cnumpy\nndarray\n(K\x05t\x81.",
    "another array type": b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\n(K\x00tU\x01btR.",
    "a dtype of objects": b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.",
    "a dtype changed to one of objects": b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01|U\x01ONNK\x08K\x08K\x3ftb.",
    "bytes of a size": b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
    "an extension": b"\x80\x02\x82\x01.",
    "a persistent object": b"Pabc\n.",
    "a name with a newline in it": b"\x80\x04\x8c\x03o\ns\x8c\x04sys\n\x93.",
    "a memory of 32 GB": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a memory of 32 GB by its number": b"]p2147483647\n.",
    "a dictionary": b"}.",
    "a number to take twice": b"K\x012.",
    "text that never ends": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "nothing to take": b"\x80\x040000.",
    "empty": b"",
    "no pickle": b"garbage that is no pickle",
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_pickles_made_by_hand(load, name):
    message = refused(load, HAND_MADE[name])
    assert "modelnet.dat" in message
    assert "copy modelnet40_test_8192pts_fps.dat" in message


def test_the_stand_ins_cannot_be_changed_for_the_next_file(load, clouds):
    for name, content in HAND_MADE.items():
        refused(load, content)
        assert_right(load(pickle.dumps((clouds, LABELS), 2)), clouds), name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_refused_or_harmless(load, clouds, data):
    """Any bytes changed: an error of one line, or numbers; never anything else."""
    content = bytearray(pickle.dumps((clouds, LABELS), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    objects, message = [], ""
    try:
        objects = load(bytes(content))
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert all(thing.label in CLASS_NAMES and np.isfinite(thing.points).all() for thing in objects)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_file_cut_short(load, clouds, share, protocol):
    content = pickle.dumps((clouds, LABELS), protocol)
    assert "is not ModelNet40's test set (" in refused(load, content[: int(share * len(content))])


def with_nan():
    cloud = np.zeros((4, 6), dtype=np.float32)
    cloud[2, 1] = np.nan
    return cloud


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (([np.zeros((4, 5))], [0]), "cloud 0 is no array of shape (points, 6)"),
        (([np.zeros((4, 6)), np.zeros(6)], [0, 0]), "cloud 1 is no array"),
        (([np.zeros((0, 6))], [0]), "cloud 0 is no array"),
        (([[1.0, 2.0]], [0]), "cloud 0 is no array"),
        (([with_nan()], [0]), "cloud 0 holds NaN"),
        (([np.zeros((4, 6))], [40]), "label 0 is no number from 0 to 39"),
        (([np.zeros((4, 6))], [-1]), "label 0 is no number"),
        (([np.zeros((4, 6))], [np.int8(-1)]), "label 0 is no number"),
        (([np.zeros((4, 6))], [1.5]), "label 0 is no number"),
        (([np.zeros((4, 6))], ["chair"]), "label 0 is no number"),
        (([np.zeros((4, 6))], [None]), "label 0 is no number"),
        (([np.zeros((4, 6))], [[1, 2]]), "label 0 is no number"),
        (([np.zeros((4, 6))], [np.array([1, 2])]), "label 0 is no number"),
        (([np.zeros((4, 6))], [10**30]), "label 0 is no number"),
        (([np.zeros((4, 6))], [0, 1]), "as many labels as clouds"),
        (([], []), "as many labels as clouds"),
        (([np.zeros((4, 6))], 3), "as many labels as clouds"),
        ([np.zeros((4, 6))], "a list of clouds and a list of labels"),
        (None, "a list of clouds and a list of labels"),
    ],
)
def test_other_contents_are_named(load, content, message):
    told = refused(load, pickle.dumps(content))
    assert message in told
    assert told.endswith("; copy modelnet40_test_8192pts_fps.dat again")


def test_clouds_without_normals(load):
    assert load(pickle.dumps(([np.ones((4, 3))], [2])))[0].points.tolist() == [[1, 1, 1, 0, 0, 0]] * 4


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.dat: No such file"):
        load_modelnet40(tmp_path / "nothing.dat")
