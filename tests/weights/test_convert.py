"""Weights load, convert and export exactly in every naming, and a failed load leaves the model unchanged."""

import gc
import pickle
import re
import resource
import shlex
import signal
from dataclasses import asdict, replace
from itertools import pairwise

import h5py
import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    GOLDEN,
    arrays,
    fill,
    forget_variants,
    golden,
    image,
    invoked,
    leading,
    lite0_package,
    run,
    same_weights,
    save_checkpoint,
    save_torch,
    seeded,
    seeded_as,
    shallow_rows,
    timm_tensors,
    trained,
)

import keras_effnet as ke
from keras_effnet.nets.scaling import resolve
from keras_effnet.nets.variants import VARIANTS, of_timm
from keras_effnet.nets.weight_shapes import owners
from keras_effnet.weights import convert, name_translation, naming_tables, registry, store
from keras_effnet.weights.formats import h5_file, opening
from keras_effnet.weights.layouts import LAYOUTS, Layout, adapt_channels

SMALL = {"weights": None, "classes": 5, "input_shape": (32, 32, 3)}
EDGETPU = "efficientnet-edgetpu-S"
CONDCONV = "efficientnet-condconv-b0-4e"
NAMES = (
    "efficientnet-b1",
    "efficientnet-lite1",
    "efficientnet-edgetpu-s",
    "efficientnet-condconv-b0-4e",
    "efficientnet-b0",  # fewer blocks than B1
)


@pytest.fixture(scope="session")
def lite0_path():
    return lite0_package()


@pytest.fixture(scope="module")
def lite0():
    """The published net, which tests only read."""
    return ke.EfficientNetLite0()


@pytest.fixture
def small_path(mini, tmp_path_factory):
    """A file like that of `lite0_path`, for the net as `mini` reduces it."""
    return save_torch(lukemelas_tensors(), tmp_path_factory.mktemp("small") / "lite0.safetensors")


def lukemelas_tensors() -> dict[str, np.ndarray]:
    """Returns a state dict of EfficientNet-PyTorch for Lite0, as deep as the variant is."""
    names = name_translation.foreign_names(resolve(VARIANTS["efficientnet-lite0"]), naming_tables.LUKEMELAS)
    tensors = {name.foreign: foreign_values(name) for name in names.values()}
    counts = [name.replace("running_mean", "num_batches_tracked") for name in tensors if "running_mean" in name]
    return tensors | dict.fromkeys(counts, np.zeros((), np.int64))


def foreign_values(name: name_translation.Name, scope: str = "") -> np.ndarray:
    """Returns the seeded values of a tensor in another program's layout."""
    return seeded(scope + name.foreign, LAYOUTS[name.layout].from_keras(np.empty(name.shape)).shape)


@pytest.mark.parametrize("name", leading(NAMES, 4))
def test_the_layers_that_own_variables(name):
    model = ke.create_model(name, **SMALL)
    ours = {
        layer.name: (type(layer).__name__, {weight.name: tuple(weight.shape) for weight in layer.weights})
        for layer in model.layers
        if layer.weights
    }
    expected = owners(resolve(VARIANTS[name]), classes=5)
    assert list(ours) == list(expected)
    assert ours == {layer: tuple(owner) for layer, owner in expected.items()}


@pytest.mark.parametrize("naming", naming_tables.NAMINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_names_are_a_bijection(name, naming):
    architecture = resolve(VARIANTS[name])
    lacking = {"lukemelas": r"condconv|-[xh]-|-gc$", "kecam": r"condconv|-[xh]-|-gc$", "tpu": r"-gc$"}
    if naming in lacking and re.search(lacking[naming], name):
        with pytest.raises(ValueError, match=rf"can hold\. Received: '{name}'"):
            name_translation.foreign_names(architecture, naming_tables.NAMINGS[naming])
        return
    names = name_translation.foreign_names(architecture, naming_tables.NAMINGS[naming])
    assert len({found.key for found in names.values()}) == len(names)
    assert len({found.foreign for found in names.values()}) == len(names)
    assert naming_tables.NAMINGS[naming].mark in [found.foreign for found in names.values()]
    ours = [(layer, variable) for layer, owner in owners(architecture).items() for variable in owner.shapes]
    assert list(names) == ours


@pytest.mark.parametrize(
    ("file", "naming"),
    [
        ("tpu/efficientnet-b0", "tpu"),
        ("tpu/efficientnet-lite0", "tpu"),
        ("tpu/efficientnet-edgetpu-S", "tpu"),
        ("timm/tf_efficientnet_b0", "timm"),
        ("tpu/efficientnet-condconv-b0-4e", "tpu"),
        ("timm/tf_efficientnet_lite0", "timm"),
        ("timm/tf_efficientnet_cc_b0_4e", "timm"),
        ("timm/efficientnet_b1_pruned", "timm"),
    ],
)
def test_names_and_shapes_are_the_published_ones(file, naming):
    reference = golden(f"{file}.json")
    if naming == "tpu":
        model, listed, scope = file.split("/")[1].lower(), reference["variables"], file.split("/")[1] + "/"
        listed = [row[:2] for row in listed]
    else:
        model, scope = of_timm(file.split("/")[1])[0], ""
        listed = [row for row in reference["state_dict"] if not row[0].endswith("num_batches_tracked")]
    names = name_translation.foreign_names(
        resolve(VARIANTS[model]), naming_tables.NAMINGS[naming], classes=listed[-1][1][0]
    )
    found = {
        scope + name: list(LAYOUTS[layout].from_keras(np.empty(shape)).shape)
        for name, layout, shape, _ in names.values()
    }
    assert found == dict(listed)


def normalised_by_batch(model):
    """Returns the model without dropout. Called with `training=True` it normalizes by batch, like timm's reference."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    return model


FORMATS_OF_TIMM = ("timm.safetensors", "legacy.pth")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tf_efficientnet_b0", "timm.safetensors"),
        ("tf_efficientnet_lite0", "zip.pth"),
        ("tf_efficientnet_cc_b0_4e", "timm.safetensors"),
        ("efficientnet_b1_pruned", "timm.safetensors"),
        *(pytest.param("tf_efficientnet_lite0", kind, marks=pytest.mark.long) for kind in FORMATS_OF_TIMM),
    ],
)
def test_timms_files_give_timms_numbers(name, kind, tmp_path):
    path = save_torch(timm_tensors(name), tmp_path / kind)
    model = ke.create_model(
        of_timm(name)[0], weights=None, preprocessing=None, classifier_activation=None, dropout_rate=0
    )
    report = ke.weights.load(model, path, padding="same")
    assert report.format == "timm" and report.fits
    norms = sum(key.endswith("num_batches_tracked") for key in timm_tensors(name))
    assert list(report.ignored.values()) == [norms]
    reference = arrays(GOLDEN / f"timm/{name}.npz")
    x = image(golden(f"timm/{name}.json")["default_cfg"]["input_size"][1])
    assert np.abs(run(model, x) - reference["logits"]).max() < 2e-5 * reference["logits"].std()
    if kind != "legacy.pth":
        trained = keras.ops.convert_to_numpy(normalised_by_batch(model)(keras.ops.convert_to_tensor(x), training=True))
        assert np.abs(trained - reference["logits_train_bn"]).max() < 1e-4 * reference["logits_train_bn"].std()


def original_tensors(file: str, average: bool = True) -> dict[str, np.ndarray]:
    """Returns a training checkpoint of the original: the reference's values as averages, others as raw weights.

    At full depth, its names are the published ones: `test_names_and_shapes_are_the_published_ones`.
    """
    tensors = {"global_step": np.array(7, np.int64)}
    classes = 1001 if file == EDGETPU else 1000
    names = name_translation.foreign_names(resolve(VARIANTS[file.lower()]), naming_tables.TPU, classes=classes)
    for foreign in names.values():
        name, trainable = f"{file}/{foreign.foreign}", "/moving_" not in foreign.foreign
        tensors[name] = foreign_values(foreign, f"{file}/")
        shape = tensors[name].shape
        if average:
            tensors[f"{name}/ExponentialMovingAverage"] = tensors[name]
            tensors[name] = np.full(shape, 0.5, np.float32)
            if trainable:
                tensors |= {f"{name}/{slot}": np.ones(shape, np.float32) for slot in ("RMSProp", "RMSProp_1")}
    return tensors


def test_averages_by_default_and_weights_by_request(tmp_path):
    path = save_checkpoint(tmp_path / "model.ckpt", original_tensors("efficientnet-lite0"))
    model = ke.EfficientNetLite0(weights=None)
    report = ke.weights.load(model, tmp_path)
    assert same_weights(model, fill_as("efficientnet-lite0"))
    assert report.ignored == {
        "the number of training steps": 1,
        "the optimizer's state": 2 * 149,
        "the raw weights, since the file has their moving averages": 247,
    }
    ke.weights.load(model, path, raw=True)
    assert all((value == 0.5).all() for value in model.get_weights())


def fill_as(file: str, **kwargs):
    """Returns our model with the reference's values, assigned by name."""
    model = ke.create_model(file.lower(), weights=None, **kwargs)
    names = name_translation.foreign_names(
        resolve(VARIANTS[file.lower()]), naming_tables.TPU, classes=model.output.shape[-1]
    )
    for (layer, variable), name in names.items():
        target = next(weight for weight in model.get_layer(layer).weights if weight.name == variable)
        target.assign(seeded_as(file, name))
    return model


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize(
    "kind", leading(["missing average", "two nets", "shape", "missing stem", "unexpected", "raw extra"], 2)
)
def test_a_checkpoint_with_a_fault_is_told(kind, tmp_path):
    tensors = original_tensors("efficientnet-lite0")
    name = "efficientnet-lite0/blocks_3/conv2d/kernel/ExponentialMovingAverage"
    if kind == "missing average":
        del tensors[name]
    elif kind == "missing stem":
        del tensors["efficientnet-lite0/stem/conv2d/kernel/ExponentialMovingAverage"]
    elif kind == "raw extra":
        tensors["efficientnet-lite0/blocks_99/conv2d/kernel"] = np.zeros(1, np.float32)
    elif kind == "unexpected":
        tensors[name.replace("kernel", "bias")] = np.zeros(144, np.float32)
    elif kind == "shape":
        tensors[name] = tensors[name][..., 1:]
    else:
        tensors |= {f"other/{key}": value for key, value in tensors.items()}
    path = save_checkpoint(tmp_path / "model.ckpt", tensors)
    model = ke.EfficientNetLite0(weights=None)
    before = model.get_weights()
    told = {
        "missing average": rf"\(!\): - {name} \(for block3a_expand_conv/kernel\)",
        "missing stem": r"- efficientnet-lite0/stem/conv2d/kernel/ExponentialMovingAverage \(for stem_conv/kernel\)",
        "raw extra": r"\(!\): \+ efficientnet-lite0/blocks_99/conv2d/kernel$",
        "unexpected": rf"\(!\): \+ {name.replace('kernel', 'bias')}",
        "shape": r"expected shape \(1, 1, 24, 144\) for block3a_expand_conv/kernel, received \(1, 1, 24, 143\)",
        "two nets": "Expected one net",
    }[kind]
    with pytest.raises(ValueError, match=told):
        ke.weights.load(model, path)
    assert all(map(np.array_equal, model.get_weights(), before))
    for do in (
        lambda: ke.weights.convert_file(path, tmp_path / "x.safetensors"),
        lambda: convert.read(path, "efficientnet-lite0"),
    ):
        with pytest.raises(ValueError, match="Received"):
            do()
    if kind != "two nets":
        # Without its average, the raw weight is left over.
        assert len(ke.weights.verify(path, "efficientnet-lite0").problems) == 1 + kind.startswith("missing")


def renamed(tensors, how: str) -> dict[str, np.ndarray]:
    """Returns the same checkpoint with the names of another run of the program."""

    def rename(name: str) -> str:
        match = re.search(r"/model/(blocks_\d+/(?:depthwise_)?cond_conv2d)(?:_(\d+))?/", name)
        if not match or how == "no scope":
            return name.replace("/model/", "/")
        if how == "second model":
            return name.replace("/model/", "/model_1/").replace(
                match[1] + (f"_{match[2]}" if match[2] else ""), f"{match[1]}_{int(match[2] or 0) + 9}"
            )
        ours = int(match[2] or 0)  # without the layer that is created but not used
        number = ours if "depthwise" in match[1] else ours - ours // 3 - 1
        return name.replace(match[0], f"/model/{match[1]}{f'_{number}' if number else ''}/")

    return {rename(name): value for name, value in tensors.items()}


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("how", leading(["no unused layer", "no scope", "second model"], 1))
def test_mixed_experts_are_found_by_their_block_and_order(how, tmp_path):
    tensors = original_tensors(CONDCONV)
    changed = renamed(tensors, how)
    assert len(changed) == len(tensors) and changed.keys() != tensors.keys()
    model = ke.EfficientNetCondConvB0x4(weights=None)
    save_checkpoint(tmp_path / "model.ckpt", changed)
    assert ke.weights.load(model, tmp_path).fits
    assert same_weights(model, fill_as(CONDCONV))
    assert ke.weights.convert_file(tmp_path, tmp_path / "out.safetensors") == CONDCONV


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("fault", leading(["missing", "twice", "first missing", "left over", "experts", "flat"], 2))
def test_a_fault_among_mixed_experts_is_told(fault, tmp_path):
    first, last = VARIANTS[CONDCONV].stages[:5], VARIANTS[CONDCONV].stages[5:]
    # The two pointwise convolutions of a second block have equally many numbers.
    VARIANTS[CONDCONV] = replace(VARIANTS[CONDCONV], stages=(*first, replace(last[0], repeats=2), *last[1:]))
    forget_variants()
    tensors = original_tensors(CONDCONV, average=False)
    name = f"{CONDCONV}/model/blocks_7/cond_conv2d_8/condconv_kernel"
    if fault == "missing":
        del tensors[name]
    elif fault == "first missing":
        del tensors[name.replace("2d_8", "2d_7")]
    elif fault == "left over":
        tensors[name.replace("2d_8", "2d_9")] = tensors[name]
    elif fault == "twice":
        tensors[name.replace("/model/", "/")] = tensors[name]
    elif fault == "experts":
        tensors[name] = np.concatenate([tensors[name]] * 2)
    else:
        tensors[name] = tensors[name].ravel()
    told = {
        # The numbers do not show which of the two it is.
        **dict.fromkeys(
            ("missing", "first missing"),
            r"\(!\): - .*/blocks_7/cond_conv2d\*/condconv_kernel "
            r"\(for block6b_project_conv/kernel or another of its block\)$",
        ),
        "left over": r"\(!\): \+ .*/model/blocks_7/cond_conv2d_9/condconv_kernel$",
        "twice": r"\(!\): \+ .*/blocks_7/cond_conv2d_8/condconv_kernel$",
        "experts": r"cond_conv2d_8/.*: expected shape \(4, 1, 1, 1152, 192\) for .*, received \(8, 221184\)",
        "flat": r"received \(884736,\)$",
    }[fault]
    model = ke.EfficientNetCondConvB0x4(weights=None)
    before = model.get_weights()
    with pytest.raises(ValueError, match=told):
        ke.weights.load(model, save_checkpoint(tmp_path / "model.ckpt", tensors))
    assert all(map(np.array_equal, model.get_weights(), before))


@pytest.mark.parametrize("layout", leading(["E(HWIO)->EHWIO", "E(OIHW)->EHWIO", "E(C1HW)->EHWC1"], 1))
def test_a_wrong_layout_of_mixed_experts_shows(layout, tmp_path, monkeypatch):
    """Rows that were flattened in another order have the same shapes."""
    if layout == "E(HWIO)->EHWIO":
        tensors = original_tensors(CONDCONV, average=False)
        path = save_checkpoint(tmp_path / "model.ckpt", tensors)
        expected = np.array(golden(f"tpu/{CONDCONV}.json")["golden"]["logits_first16"])
    else:
        path = save_torch(timm_tensors("tf_efficientnet_cc_b0_4e"), tmp_path / "tf_efficientnet_cc_b0_4e.safetensors")
        expected = arrays(GOLDEN / "timm/tf_efficientnet_cc_b0_4e.npz")["logits"][:, :16]
    turned = Layout(lambda array, shape: array.reshape(shape), LAYOUTS[layout].from_keras)
    if layout == "E(HWIO)->EHWIO":
        turned = LAYOUTS["E(OIHW)->EHWIO"]
    monkeypatch.setitem(LAYOUTS, layout, turned)
    model = ke.EfficientNetCondConvB0x4(weights=path, preprocessing=None, classifier_activation=None)
    found = logits(model)
    assert np.abs(found[:, :16] - expected).max() > 100 * 2e-5 * found.std()


def logits(model):
    return run(model, image(224))


@pytest.mark.parametrize("fault", leading(["epsilon", "raw", "layout", "shifted norm"], 2))
def test_wrong_numerics_show(fault, tmp_path, monkeypatch):
    """The comparison with the original detects faults of a converter that leave every shape unchanged."""
    file = "efficientnet-lite0"
    tensors = original_tensors(file)
    kwargs = {"bn_epsilon": 1e-5} if fault == "epsilon" else {}
    if fault == "shifted norm":  # gamma and beta exchanged
        table = dict(naming_tables.TPU.variables["BatchNormalization"])
        table["gamma"], table["beta"] = table["beta"], table["gamma"]
        variables = naming_tables.TPU.variables | {"BatchNormalization": table}
        monkeypatch.setitem(naming_tables.NAMINGS, "tpu", replace(naming_tables.TPU, variables=variables))
    elif fault == "layout":  # one square kernel, its axes exchanged
        name = f"{file}/blocks_0/depthwise_conv2d/depthwise_kernel/ExponentialMovingAverage"
        tensors[name] = tensors[name].transpose(1, 0, 2, 3)
    model = ke.EfficientNetLite0(weights=None, preprocessing=None, classifier_activation=None, **kwargs)
    ke.weights.load(model, save_checkpoint(tmp_path / "model.ckpt", tensors), raw=fault == "raw")
    expected = np.array(golden(f"tpu/{file}.json")["golden"]["logits_first16"])
    found = logits(model)
    assert np.abs(found[:, :16] - expected).max() > 100 * 2e-5 * found.std()


def test_wrong_layouts_of_timms_kernels_show(tmp_path):
    """Exchanging height and width keeps all shapes, and so does turning the classifier's rows around."""
    name = "tf_efficientnet_b0"
    path = save_torch(timm_tensors(name), tmp_path / f"{name}.safetensors")
    model = ke.EfficientNetB0(weights=path, preprocessing=None, classifier_activation=None)
    expected = arrays(GOLDEN / f"timm/{name}.npz")["logits"]
    for layout in ("OIHW->HWIO", "C1HW->HWC1", "OI->IO"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(LAYOUTS, layout, turned(LAYOUTS[layout], rows=layout == "OI->IO"))
            ke.weights.load(model, path)
        assert np.abs(run(model, image(224)) - expected).max() > 30 * 2e-5 * expected.std(), layout


def turned(right: Layout, rows: bool) -> Layout:
    """Returns a layout with a fault."""
    turn = (lambda array: array[::-1]) if rows else (lambda array: array.swapaxes(0, 1))
    return replace(right, to_keras=lambda array, shape: turn(right.to_keras(array, shape)))


@pytest.mark.usefixtures("shallow")
def test_the_background_class(tmp_path):
    path = save_checkpoint(tmp_path / "model.ckpt", original_tensors(EDGETPU))
    whole, usual = fill_as(EDGETPU, classes=1001), ke.EfficientNetEdgeTPUS(weights=path)
    exact = ke.EfficientNetEdgeTPUS(weights=path, classes=1001)
    assert same_weights(whole, exact)
    for ours, original in zip(usual.layers[-1].get_weights(), whole.layers[-1].get_weights(), strict=True):
        assert np.array_equal(ours, original[..., 1:])
    with pytest.raises(ValueError, match="built with classes=1001"):
        ke.weights.export(usual, tmp_path / "out")
    assert not (tmp_path / "out.index").exists()
    ke.weights.export(exact, tmp_path / "out")
    again = ke.EfficientNetEdgeTPUS(weights=tmp_path / "out", classes=1001)
    assert same_weights(again, exact)
    ke.weights.convert_file(path, tmp_path / "es.safetensors")
    assert same_weights(ke.EfficientNetEdgeTPUS(weights=tmp_path / "es.safetensors"), usual)


@pytest.mark.parametrize("channels", leading([1, 4, 2, 7], 2))
def test_other_channel_counts(channels, lite0, lite0_path):
    usual = lite0
    shape = (224, 224, channels)
    model = ke.EfficientNetLite0(weights=lite0_path, input_shape=shape)
    kernel, adapted = (net.get_layer("stem_conv").get_weights()[0] for net in (usual, model))
    assert adapted.shape == (3, 3, channels, 32)
    if channels == 1:  # the same as three equal channels
        grey = np.random.default_rng(0).uniform(0, 255, (1, 224, 224, 1)).astype("float32")
        close = np.abs(run(model, grey) - run(usual, np.repeat(grey, 3, axis=-1))).max()
        assert close < 1e-5
    else:
        for place in range(channels):
            assert np.allclose(adapted[:, :, place], kernel[:, :, place % 3] * 3 / channels, rtol=1e-6)
    torch = pytest.importorskip("torch")
    theirs = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
    theirs = theirs.sum(1, keepdim=True) if channels == 1 else theirs.repeat(1, 3, 1, 1)[:, :channels] * (3 / channels)
    assert np.allclose(adapt_channels(kernel, channels), theirs.numpy().transpose(2, 3, 1, 0), rtol=1e-6, atol=1e-7)


def test_a_head_is_left_alone_only_by_request(small_path, tmp_path):
    model = ke.EfficientNetLite0(**SMALL)
    before = model.get_weights()
    with pytest.raises(ValueError, match="include_top=False"):
        ke.weights.load(model, small_path)
    assert all(map(np.array_equal, model.get_weights(), before))
    report = ke.weights.load(model, small_path, include_top=False)
    assert report.not_loaded == ("predictions/kernel", "predictions/bias")
    assert all(map(np.array_equal, model.get_weights()[-2:], before[-2:]))
    body = ke.EfficientNetLite0(include_top=False, weights=small_path)
    assert all(map(np.array_equal, model.get_weights()[:-2], body.get_weights()))
    ke.weights.export(body, tmp_path / "body.safetensors", target="timm")
    with pytest.raises(ValueError, match=r"include_top=False.*- classifier\.weight"):
        ke.weights.load(ke.EfficientNetLite0(weights=None), tmp_path / "body.safetensors")
    assert ke.weights.load(model, tmp_path / "body.safetensors", include_top=False).not_loaded == report.not_loaded


def test_a_report_prints_one_line_and_keeps_its_fields(lite0_path, tmp_path):
    net, file = "efficientnet-lite0", "tensors of a lukemelas file"
    whole = ke.weights.load(ke.EfficientNetLite0(weights=None), lite0_path)
    assert repr(whole) == f"loaded 247 of 247 {file} into {net}"
    headless = ke.weights.load(ke.EfficientNetLite0(**SMALL), lite0_path, include_top=False)
    assert repr(headless) == f"loaded 245 of 247 {file} into {net} (all but the classifier)"
    body = ke.EfficientNetLite0(weights=None, include_top=False)
    assert repr(ke.weights.load(body, lite0_path)) == f"loaded 245 of 245 {file} into {net}"
    fits = ke.weights.verify(lite0_path, net)
    assert repr(fits) == str(fits) == f"247 of 247 {file} fit {net}"
    partly = ke.weights.verify(lite0_path, net, include_top=False)
    assert repr(partly) == f"245 of 247 {file} fit {net} (all but the classifier)"
    tensors = {name: np.ascontiguousarray(value) for name, value in content(lite0_path).items()}
    for kind in ("missing", "unexpected", "nan"):
        tensors = broken(tensors, kind)
    tensors["_bn0.weight"], tensors["_extra"] = tensors["_bn0.weight"][1:], np.zeros(1)
    path = save_torch(tensors, tmp_path / "x.safetensors")
    faulty = ke.weights.verify(path, net)
    assert repr(faulty) == f"a lukemelas file does not fit {net}: 1 missing, 2 unexpected, 1 wrong"
    other = ke.weights.verify(lite0_path, "efficientnet-lite1")
    signs = [problem[0] for problem in other.problems]
    assert signs.count("-") and signs.count("!") and not signs.count("+")
    assert repr(other) == (
        f"a lukemelas file does not fit efficientnet-lite1: {signs.count('-')} missing, {signs.count('!')} wrong; "
        f"it contains {net}"
    )
    for report in (whole, headless, fits, partly, faulty, other):
        fields = ["path", "format", "loaded", "not_loaded", "ignored", "problems", "classes", "model"]
        assert list(asdict(report)) == fields  # what `verify --json` prints
        assert asdict(report) == {name: getattr(report, name) for name in fields}
        assert repr(pickle.loads(pickle.dumps(report))) == repr(report)


def content(path) -> dict[str, np.ndarray]:
    with opening.opened(path) as tensors:
        return {name: stored.read() for name, stored in tensors.items()}


@pytest.mark.parametrize(
    ("name", "depth"),  # all names of all nets: test_names_are_a_bijection
    [
        ("efficientnet-b0", "mini"),
        ("efficientnet-lite0", "mini"),
        ("efficientnet-edgetpu-s", "shallow"),
        ("efficientnet-condconv-b0-4e", "shallow"),
    ],
)
def test_round_trips_are_exact(name, depth, tmp_path, request):
    request.getfixturevalue(depth)
    model = fill(ke.create_model(name, **SMALL))
    targets = {"tpu": "a/model.ckpt", "timm": "a.safetensors", "keras": "a.h5"}
    (tmp_path / "a").mkdir()
    again = ke.create_model(name, **SMALL)
    for target, file in targets.items():
        path = ke.weights.export(model, tmp_path / file, target=target)
        again.set_weights([np.zeros_like(value) for value in again.get_weights()])
        assert ke.weights.load(again, path, source=target).format == target
        assert same_weights(model, again)
    # File to file, in a ring: the last equals the first, bit for bit.
    ring = ["a.safetensors", "b.h5", "c.weights.h5", "d.keras", "e.ckpt", "f.safetensors"]
    for one, next_one in pairwise(ring):
        assert ke.weights.convert_file(tmp_path / one, tmp_path / next_one) == name
    assert (tmp_path / ring[0]).read_bytes() == (tmp_path / ring[-1]).read_bytes()
    first, last = content(tmp_path / "a"), content(tmp_path / "e.ckpt")
    assert first.keys() == last.keys() and all(np.array_equal(first[key], last[key]) for key in first)
    assert not list(tmp_path.rglob(".*"))


NATIVE = ("gc_efficientnetv2_rw_t", "efficientnet_b2")
OTHERS = (
    "tf_efficientnetv2_s",  # tests/nets/test_family.py loads V2-B0, whose layers have the same names
    "efficientnetv2_rw_t",
    "efficientnet_x_b5",
    "tf_efficientnet_b0",
    "tf_efficientnet_lite0",
    "tf_efficientnet_cc_b0_4e",
)


@pytest.mark.parametrize("name", leading(NATIVE + OTHERS, len(NATIVE)))
def test_timm_finds_what_it_loads_strictly(name, tmp_path):
    """`load_state_dict(strict=True)` requires exactly these names and shapes."""
    path = save_torch(timm_tensors(name), tmp_path / f"{name}.safetensors")
    model = ke.create_model(of_timm(name)[0], weights=path)
    found = content(ke.weights.export(model, tmp_path / "out.safetensors", target="timm"))
    assert {key: list(value.shape) for key, value in found.items()} == dict(golden(f"timm/{name}.json")["state_dict"])
    for key, value in content(path).items():
        assert np.array_equal(found[key], value) and found[key].dtype == value.dtype


def test_the_original_restores_what_was_exported(tmp_path):
    """Restores as the original's evaluation does: graph variables by name, averages with variables_to_restore."""
    tf = pytest.importorskip("tensorflow")
    model = fill(ke.EfficientNetLite0(weights=None))
    ke.weights.export(model, tmp_path)
    reference = golden("tpu/efficientnet-lite0.json")
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        step = v1.train.get_or_create_global_step()
        variables = [
            v1.get_variable(name, shape, None, v1.zeros_initializer(), trainable=trainable, use_resource=False)
            for name, shape, trainable in reference["variables"]
        ]
        averages = v1.train.ExponentialMovingAverage(decay=0.0).variables_to_restore(variables)
        assert step in averages.values() and len(averages) == len(variables) + 1
        for names in (averages, None):
            session.run(v1.global_variables_initializer())
            v1.train.Saver(names).restore(session, tf.train.latest_checkpoint(str(tmp_path)))
            for variable, value in zip(variables, session.run(variables), strict=True):
                assert np.array_equal(value, seeded(f"net/{variable.op.name.partition('/')[2]}", value.shape))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the files do not depend on the backend")
@pytest.mark.parametrize(
    ("number", "include_top"), leading([(number, top) for number in range(8) for top in (True, False)], 1)
)
def test_keras_2_files_load(number, include_top, tmp_path):
    applications = pytest.importorskip("tf_keras").applications
    kwargs = {"include_top": include_top, "weights": None, "input_shape": (32, 32, 3)}
    theirs = getattr(applications, f"EfficientNetB{number}")(**kwargs)
    values = [seeded(f"{place}", value.shape or (1,)) for place, value in enumerate(theirs.get_weights())]
    theirs.set_weights([new.reshape(old.shape) for new, old in zip(values, theirs.get_weights(), strict=True)])
    theirs.save_weights(tmp_path / "x.h5")
    model = ke.create_model(f"efficientnet-b{number}", **kwargs)
    report = ke.weights.load(model, tmp_path / "x.h5")
    assert list(report.ignored.values()) == [3]  # its Normalization
    for layer in model.layers:
        if layer.weights:
            assert all(map(np.array_equal, layer.get_weights(), theirs.get_layer(layer.name).get_weights()))
    if number == 0:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format is old
            theirs.save(tmp_path / "whole.h5")
        first = model.get_weights()
        model.set_weights([np.zeros_like(value) for value in first])
        ke.weights.load(model, tmp_path / "whole.h5")
        assert all(map(np.array_equal, model.get_weights(), first))
    del theirs
    gc.collect()


@pytest.mark.parametrize(
    "scheme", ["imagenet", *(pytest.param(scheme, marks=pytest.mark.long) for scheme in ("inception", None))]
)
def test_keras_applications_loads_what_was_exported(scheme, tmp_path):
    shape = (64, 64, 3)
    model = fill(ke.EfficientNetB0(weights=None, preprocessing=scheme, input_shape=shape))
    path = ke.weights.export(model, tmp_path / "b0.h5", target="keras")
    theirs = keras.applications.EfficientNetB0(weights=str(path), input_shape=shape)
    largest = 255 if scheme else 1  # numbers that are normalized already are small
    pixels = np.random.default_rng(0).uniform(0, largest, (2, *shape)).astype("float32")
    ours = run(model, pixels)
    assert np.abs(run(theirs, pixels) - ours).max() < 1e-5 * ours.max()
    # What it saves is read, too.
    theirs.save(tmp_path / "theirs.h5")
    values = model.get_weights()
    model.set_weights([1 + value for value in values])
    ke.weights.load(model, tmp_path / "theirs.h5")
    assert all(map(np.array_equal, model.get_weights(), values))


@pytest.mark.usefixtures("mini")
def test_weights_of_a_mixed_precision_model_are_exported_as_float32(tmp_path):
    model = fill(ke.EfficientNetLite0(**SMALL, dtype="bfloat16"))
    path = ke.weights.export(model, tmp_path / "x.safetensors", target="timm")
    assert {value.dtype for value in content(path).values()} == {np.dtype("float32"), np.dtype("int64")}
    again = ke.EfficientNetLite0(**SMALL, dtype="bfloat16")
    ke.weights.load(again, path)
    assert same_weights(model, again)
    model.save_weights(tmp_path / "x.weights.h5")
    third = ke.EfficientNetLite0(**SMALL, dtype="bfloat16")
    ke.weights.load(third, tmp_path / "x.weights.h5")
    assert same_weights(model, third)


@pytest.mark.usefixtures("mini", "eager")
def test_a_trained_model_loads_without_its_optimizer(tmp_path):
    model = ke.EfficientNetLite0(**SMALL)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(np.zeros((2, 32, 32, 3)), np.zeros(2), verbose=0)
    again = ke.EfficientNetLite0(**SMALL)
    for suffix in (".keras", ".weights.h5"):
        path = tmp_path / f"x{suffix}"
        model.save(path) if suffix == ".keras" else model.save_weights(path)
        again.set_weights([np.zeros_like(value) for value in again.get_weights()])
        assert "the optimizer's state" in ke.weights.load(again, path).ignored
        assert same_weights(again, model)


def headed(classes=3):
    """Returns a net, and a model of it with another head and an optimizer with a state."""
    body = ke.EfficientNetLite0(weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    model = keras.Model(body.inputs, keras.layers.Dense(classes, name="out")(body.output))
    model.compile(keras.optimizers.RMSprop(1e-4), "mse")
    model.optimizer.build(model.trainable_variables)
    for slot in model.optimizer.variables[2:]:
        slot.assign(np.random.default_rng(0).uniform(0, 1, slot.shape))
    return body, model


def everything(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(variable.value)) for variable in variables]


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("suffix", [".keras", pytest.param(".weights.h5", marks=pytest.mark.long)])
def test_a_net_with_an_own_head(suffix, tmp_path):
    (body, model), (_, other) = headed(), headed()
    for net, name in ((body, "body"), (model, "whole")):
        path = tmp_path / f"{name}{suffix}"
        net.save(path) if suffix == ".keras" else net.save_weights(path)
    ke.weights.load(other, tmp_path / f"body{suffix}")
    assert all(map(np.array_equal, other.get_weights()[:-2], body.get_weights()))
    assert not same_weights(other, model)
    report = ke.weights.load(other, tmp_path / f"whole{suffix}")
    assert same_weights(other, model)
    count = len(other.weights)
    assert repr(report) == f"loaded {count} of {count} tensors of a keras3 file into {other.name}"
    x = keras.layers.Conv2D(3, 1)(keras.Input((32, 32, 1)))
    built_on = ke.EfficientNetLite0(include_top=False, weights=tmp_path / f"body{suffix}", input_tensor=x)
    assert all(map(np.array_equal, built_on.get_weights()[-4:], body.get_weights()[-4:]))
    # A failed load leaves the optimizer unchanged, too.
    model.get_layer("out").bias.assign(np.full(3, np.nan, "float32"))
    model.optimizer.iterations.assign(7)
    model.save(tmp_path / f"nan{suffix}") if suffix == ".keras" else model.save_weights(tmp_path / f"nan{suffix}")
    before = everything(other)
    with pytest.raises(ValueError, match="not finite"):
        ke.weights.load(other, tmp_path / f"nan{suffix}")
    assert all(map(np.array_equal, everything(other), before))


def applications_b0(**kwargs):
    """Returns the net of keras.applications that B0 is with the fixture `shallow`."""
    from keras.src.applications import efficientnet  # the public module has no nets of other depths

    settings = {"name": "efficientnetb0", "weights": None, "weights_name": "b0", "blocks_args": shallow_rows()}
    return efficientnet.EfficientNet(1.0, 1.0, 224, **settings | kwargs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend writes the file")
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("suffix", leading([".keras", ".h5", ".weights.h5"], 1))
def test_a_net_inside_of_another_model(suffix, tmp_path):
    theirs = applications_b0(include_top=False, pooling="avg")
    outer = keras.Sequential([theirs, keras.layers.Dense(3)])
    path = tmp_path / f"x{suffix}"
    outer.save_weights(path) if suffix == ".weights.h5" else outer.save(path)
    report = ke.weights.verify(path, "efficientnet-b0", include_top=False)
    assert report.fits and report.ignored["layers around the net"] == 2
    assert len(report.loaded) == sum("normalization" not in variable.path for variable in theirs.weights)


def test_quantized_and_overflowing_models_are_refused(small_path, tmp_path):
    model = ke.EfficientNetLite0(weights=None)
    model.get_layer("predictions").quantize("int8")
    for do in (
        lambda: ke.weights.load(model, small_path),
        lambda: ke.weights.export(model, tmp_path / "x.safetensors", target="timm"),
    ):
        with pytest.raises(ValueError, match="as in a quantized net"):
            do()
    large = ke.EfficientNetLite0(**SMALL)
    large.get_layer("top_bn").moving_variance.assign(np.full(1280, 1e6, "float32"))
    ke.weights.export(large, tmp_path / "x.safetensors", target="timm")
    half = ke.EfficientNetLite0(**SMALL, dtype="float16")
    before = half.get_weights()
    with pytest.raises(ValueError, match=r"range of float16.*top_bn/moving_variance reaches 1e\+06"):
        ke.weights.load(half, tmp_path / "x.safetensors")
    assert all(map(np.array_equal, half.get_weights(), before))


@pytest.mark.usefixtures("mini")
def test_export_refuses_what_others_would_compute_otherwise(tmp_path):
    with pytest.raises(ValueError, match=r"bn_epsilon=0\.001, which .* padding='same'"):
        ke.weights.export(ke.EfficientNetLite0(**SMALL, bn_epsilon=1e-5), tmp_path / "x.h5", target="keras")
    model = ke.EfficientNetLite0(**SMALL)
    for path, target, told in (
        ("", None, "Expected a path to write to"),
        ("x.h5", "timm", "ends in"),
        ("x.onnx", None, "ends in"),
        ("x.keras", None, r"model\.save"),
    ):
        with pytest.raises(ValueError, match=told):
            ke.weights.export(model, path and tmp_path / path, target=target)
    assert not list(tmp_path.iterdir())
    assert ke.weights.export(model, tmp_path / "m.safetensors").stat().st_mode & 0o044 == 0o044
    for path in ("x.h5", "x.safetensors", "a", "b.ckpt-7"):  # by their endings
        assert ke.weights.verify(ke.weights.export(model, tmp_path / path), "efficientnet-lite0").fits


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the command does not depend on the backend")
@pytest.mark.parametrize(
    "name",
    ["x.keras", *(pytest.param(name, marks=pytest.mark.long) for name in ("x.ckpt", "x.safetensors", "x.h5"))],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(name, small_path, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.getsignal(signal.SIGXFSZ)
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
        result = invoked("convert", small_path, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "File too large" in lines[0] and name in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("mini")
def test_a_published_files_preprocessing_is_kept(tmp_path, monkeypatch):
    path = ke.weights.export(ke.EfficientNetB0(weights=None), tmp_path / "x.safetensors", target="timm")
    record = registry.find("efficientnet-b0", "advprop")
    known = replace(record, files=(registry.File("timm", "https://x/x", registry.digest(path, "sha256")),))
    monkeypatch.setattr(registry, "RECORDS", (known,))
    ke.weights.convert_file(path, tmp_path / "x.keras")
    assert ke.describe(keras.models.load_model(tmp_path / "x.keras"))["preprocessing"] == "inception"


@pytest.mark.usefixtures("shallow")
def test_verify_takes_classes_and_channels_from_the_file(tmp_path):
    for name, kwargs in (("efficientnet-edgetpu-s", {"classes": 1001}), ("efficientnet-lite0", {"classes": 7})):
        model = ke.create_model(name, weights=None, **kwargs)
        path = ke.weights.export(model, tmp_path / f"{name}.safetensors", target="timm")
        assert ke.weights.verify(path, name).fits
    grey = ke.EfficientNetLite0(weights=None, input_shape=(32, 32, 1))
    assert ke.weights.verify(
        ke.weights.export(grey, tmp_path / "x.safetensors", target="timm"), "efficientnet-lite0"
    ).fits
    body = ke.EfficientNetLite0(weights=None, include_top=False)
    path = ke.weights.export(body, tmp_path / "y.safetensors", target="timm")
    assert len(ke.weights.verify(path, "efficientnet-lite0").problems) == 2
    assert ke.weights.verify(path, "efficientnet-lite0", include_top=False).fits


def test_convert_refuses_what_it_cannot_do(tmp_path, lite0_path):
    for arguments, told in (
        ((lite0_path, tmp_path / "x.pth"), r"ends in .*\.safetensors for 'timm'"),
        ((lite0_path, tmp_path / "x.h5", None, "auto", "own"), r"Expected a path that ends in.*for 'own'$"),
        ((lite0_path, tmp_path / "x.h5", None, "auto", "timm"), r"Expected a path that ends in.*for 'timm'$"),
        ((lite0_path, tmp_path / "x.tflite"), r"Expected a path that ends in.*x\.tflite'$"),
        ((lite0_path, tmp_path / "x.keras", None, "auto", "tpu"), r"Expected a path that ends in.*for 'tpu'$"),
        ((lite0_path, tmp_path / "x.h5", None, "tpu"), "which is a state dict of EfficientNet-PyTorch"),
        ((lite0_path, tmp_path / "x.h5", "efficientnet-lite1"), "Expected exactly the tensors of 'efficientnet-lite1'"),
        ((lite0_path, tmp_path / "x.h5", "efficientnet-lite9"), "Nearest: 'efficientnet-lite"),
        ((lite0_path, tmp_path / "no" / "x.h5"), "Expected a folder to write to"),
        ((lite0_path, tmp_path / "x.h5", None, "auto", "onnx"), "Unknown target"),
    ):
        with pytest.raises((ValueError, OSError), match=told):
            ke.weights.convert_file(*arguments)
    assert not list(tmp_path.iterdir())
    tensors = content(lite0_path)
    del tensors["_conv_head.weight"]
    save_torch({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"Nearest: efficientnet-lite0 \(tensors that differ: 1\)"):
        ke.weights.convert_file(tmp_path / "x.safetensors", tmp_path / "y.h5")


def test_wrapped_names_are_recognised(lite0_path, tmp_path):
    tensors = {f"module.{name}": np.ascontiguousarray(value) for name, value in content(lite0_path).items()}
    path = save_torch(tensors, tmp_path / "x.safetensors")
    assert ke.weights.verify(path, "efficientnet-lite0").fits
    other = ke.weights.verify(path, "efficientnet-lite1")
    assert other.model == "efficientnet-lite0" and not other.fits
    problems = other.problems
    assert any(problem.startswith("- module._blocks.") for problem in problems)


@pytest.mark.parametrize("start", ["module.encoder.", *(pytest.param(s, marks=pytest.mark.long) for s in ("a.", ""))])
def test_a_net_with_another_head_of_pytorch(start, small_path, tmp_path):
    """A training checkpoint whose net has a prefix, beside an optimizer's state and a head of another name."""
    torch = pytest.importorskip("torch")
    state = {
        name: torch.from_numpy(np.array(value)) for name, value in content(small_path).items() if "_fc" not in name
    }
    kernel, bias = torch.randn(5, 1280), torch.randn(5)
    whole = {f"{start}{name}": value for name, value in state.items()} | {"head.weight": kernel, "head.bias": bias}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "model_state_dict": whole, "optimizer_state_dict": optimizer}, path)
    body, model = ke.EfficientNetLite0(include_top=False, weights=None), ke.EfficientNetLite0(**SMALL)
    assert ke.weights.load(body, path).ignored["layers around the net"] == 2
    report = ke.weights.load(model, path, include_top=False)
    assert report.fits and report.not_loaded == ("predictions/kernel", "predictions/bias")
    assert same_weights(body, ke.EfficientNetLite0(include_top=False, weights=small_path))
    with pytest.raises(ValueError, match=r"\+ head\.weight"):
        ke.weights.load(model, path)
    done = convert.convert(path, tmp_path / "body.keras")
    assert done.left == ("head: layers around the net. To keep it: --head linear:5",)
    with pytest.raises(ValueError, match=r"a classifier, to save labels with.*pass --head linear:2"):
        convert.convert(path, tmp_path / "new.keras", labels=["cat", "dog"])
    assert not (tmp_path / "new.keras").exists()
    assert convert.convert(path, tmp_path / "new.keras", head="linear:5").left == ()
    weights = keras.saving.load_model(tmp_path / "new.keras").get_layer("predictions").get_weights()
    assert np.array_equal(weights[0], kernel.numpy().T) and np.array_equal(weights[1], bias.numpy())
    other = convert.convert(path, tmp_path / "other.keras", head="linear:4")
    assert "a classifier of 4 classes: the file has 0. The new one is of zeros" in other.left
    found = ke.weights.identify(path)
    assert (found.model, found.classes, found.loaded) == ("efficientnet-lite0", None, len(body.weights))


def layer(name, rows, columns=None, bias=True):
    """Returns the tensors of a linear layer of PyTorch."""
    kernel = seeded(f"{name}.weight", (rows, columns) if columns else (rows,))
    return {f"{name}.weight": kernel} | ({f"{name}.bias": seeded(f"{name}.bias", (rows,))} if bias else {})


AROUND = "{}: layers around the net"


@pytest.mark.parametrize(
    ("start", "head", "others", "classes", "left"),
    [
        # What is known to be the net's classifier is converted with it, and the rest is listed.
        ("", "classifier", layer("aux", 3, 40), 3, AROUND.format("aux")),
        ("model.", "classifier", layer("criterion", 3, bias=False), 3, AROUND.format("criterion")),
        ("module.", "classifier", {"n_averaged": np.zeros((), np.int64)}, 3, None),
        ("", "classifier.1", {}, 3, None),  # torchvision: a dropout and a linear layer
        ("net.", "classifier.1", layer("aux", 3, 40), 3, AROUND.format("aux")),
        # A layer outside of the net whose name begins like that of the classifier is another layer.
        ("net.", "classifier", layer("classifier_head", 3, 40), 3, AROUND.format("classifier_head")),
        ("net.", "classifier", layer("classifier2", 3, 1280), 3, AROUND.format("classifier2")),
        ("net.", "classifier", layer("classifier.1", 3, 40), 3, AROUND.format("classifier.1")),
        ("net.", "classifier.1", layer("classifier2", 3, 40), 3, AROUND.format("classifier2")),
        (
            "net.",
            "",
            layer("neck", 1280, bias=False) | layer("classifier.1", 3, 1280),
            None,
            AROUND.format("classifier.1, neck"),
        ),
        # All else is listed, with the body alone.
        ("", "", layer("classifier.1", 64, 1280) | layer("classifier.4", 3, 64), None, "classifier.1, classifier.4"),
        ("", "", layer("classifier", 3, 1280, bias=False), None, AROUND.format("classifier")),
        ("", "", layer("classifier.1", 3, 1280, bias=False), None, AROUND.format("classifier.1")),
        ("", "", layer("classifier", 3, 2560), None, AROUND.format("classifier")),
        ("", "", layer("a", 3, 1280) | layer("b", 3, 1280), None, AROUND.format("a, b")),
        ("", "", layer("a", 3, 1280) | layer("b", 2, 1280), None, "To keep one: --head linear:3 or --head linear:2"),
        (
            "net.",
            "",
            layer("neck", 1280, bias=False) | layer("classifier", 3, 1280),
            None,
            AROUND.format("classifier, neck"),
        ),
    ],
)
@pytest.mark.usefixtures("mini")
def test_layers_around_a_net_of_timm(start, head, others, classes, left, tmp_path):
    names = name_translation.foreign_names(resolve(VARIANTS["efficientnet-b0"]), naming_tables.TIMM, 3, 3)
    values = {key: foreign_values(name) for key, name in names.items()}
    tensors = {names[key].foreign: value for key, value in values.items() if key[0] != "predictions"}
    if head:
        tensors |= {
            f"{head}.{part}": values["predictions", key] for part, key in (("weight", "kernel"), ("bias", "bias"))
        }
    tensors = {f"{start}{name}": np.ascontiguousarray(value) for name, value in tensors.items()} | others
    path = save_torch(tensors, tmp_path / "my net.safetensors")
    found = ke.weights.identify(path)
    assert shlex.split(found.command) == ["keras-effnet", "convert", str(path), "my net.keras"]
    done = convert.convert(path, tmp_path / "new.keras", padding="same")
    assert found.left == done.left and (left in done.left[0] if left else not done.left)
    assert found.classes == classes
    model = keras.saving.load_model(tmp_path / "new.keras")
    kernels = [each for each in model.layers if each.name == "predictions"]
    assert len(kernels) == (classes is not None)
    for each in kernels:
        assert np.array_equal(each.get_weights()[0], values["predictions", "kernel"].T)
    del tensors[f"{start}bn2.running_mean"]  # of the net itself, each tensor is needed
    with pytest.raises(ValueError, match=r"- .*bn2\.running_mean"):
        convert.convert(save_torch(tensors, path), tmp_path / "other.keras")
    assert not (tmp_path / "other.keras").exists()


@pytest.mark.usefixtures("mini")
def test_integers_are_no_weights(tmp_path):
    tensors = lukemelas_tensors() | {"_conv_head.weight": np.ones((1280, 40, 1, 1), np.int8)}
    path = save_torch(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=r"_conv_head\.weight cannot be read \(Expected floats\. Received: int8"):
        ke.weights.convert_file(path, tmp_path / "x.keras")


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize(("kind", "told"), [("int8", "Expected floats"), ("float32", "Expected finite numbers")])
def test_a_head_of_other_numbers_is_named(kind, told, tmp_path):
    head = {"head.weight": np.full((3, 1280), np.nan if kind == "float32" else 1, kind), "head.bias": np.zeros(3)}
    tensors = {name: value for name, value in lukemelas_tensors().items() if not name.startswith("_fc")} | head
    path = save_torch({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"{told}\. Received: '{re.escape(str(path))}', whose head has (int8|others)"):
        convert.convert(path, tmp_path / "x.keras", head="linear:3")


@pytest.mark.usefixtures("mini")
def test_a_torch_file_by_another_name_is_read_as_what_it_is(tmp_path):
    path = save_torch(lukemelas_tensors(), tmp_path / "zip.pth").rename(tmp_path / "model.keras")
    assert ke.weights.identify(path).model == "efficientnet-lite0"
    assert ke.weights.convert_file(path, tmp_path / "new.keras") == "efficientnet-lite0"


@pytest.mark.usefixtures("mini")
def test_qubvels_files_call_the_classifier_probs(tmp_path):
    model = fill(ke.EfficientNetB0(weights=None, classes=5))
    tensors = content(ke.weights.export(model, tmp_path / "ours.h5"))
    tensors = {name.replace("predictions/", "probs/"): value for name, value in tensors.items()}
    for name in [name for name in tensors if name.startswith("normalization/")]:
        del tensors[name]
    path = h5_file.write_h5(tmp_path / "theirs.h5", tensors, ([1.0] * 3, [0.0] * 3))
    with h5py.File(path, "a") as file:
        file.attrs["layer_names"] = [name for name in file.attrs["layer_names"] if "normalization" not in str(name)]
    other = ke.EfficientNetB0(weights=None, classes=5)
    assert ke.weights.load(other, path).fits and same_weights(other, model)
    assert ke.weights.verify(path, "efficientnet-b0").classes == 5
    tensors["probs/kernel"] = tensors["probs/kernel"][1:]
    with pytest.raises(ValueError, match=r"! probs/kernel: expected shape \(1280, 5\)"):
        ke.weights.load(other, h5_file.write_h5(path, tensors, ([1.0] * 3, [0.0] * 3)))


def test_keras_cv_attention_models_nets_compute_the_same(tmp_path):
    """Its B0 has other layer names, and no layers for pixels."""
    recorded = golden("kecam/efficientnet_v1_b0.json")
    named = {name: seeded(f"{n}/{name}", tuple(shape)) for n, (name, shape) in enumerate(recorded["variables"])}
    path = h5_file.write_h5(tmp_path / "theirs.h5", named, ([1.0] * 3, [0.0] * 3))
    settings = {
        "input_shape": (64, 64, 3),
        "classes": 10,
        "classifier_activation": None,
        "preprocessing": None,
        "dtype": "float64",
    }
    model = ke.EfficientNetB0(weights=None, dropout_rate=0, drop_connect_rate=0, **settings)
    ke.weights.load(model, path)
    x = np.random.default_rng(0).normal(size=(4, 64, 64, 3))
    found = keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(x), training=True))
    expected = np.array(recorded["batch_logits"])
    assert np.abs(found - expected).max() < 1e-6 * expected.std()


@pytest.mark.usefixtures("mini")
def test_lite_nets_of_keras_cv_attention_models_are_refused(tmp_path):
    """They have swish where ours have relu6."""
    names = name_translation.foreign_names(resolve(VARIANTS["efficientnet-lite0"]), naming_tables.KECAM)
    lite = {name.foreign: np.ones(name.shape, np.float32) for name in names.values()}
    path = h5_file.write_h5(tmp_path / "theirs.h5", lite, ([1.0] * 3, [0.0] * 3))
    for refused in (
        lambda: ke.EfficientNetLite0(weights=path),
        lambda: convert.convert(path, tmp_path / "x.keras"),
        lambda: ke.weights.identify(path),
    ):
        with pytest.raises(ValueError, match="the activation: expected relu6, received silu"):
            refused()


@pytest.mark.parametrize("version", ["2.4.0", "2.12.0"])
@pytest.mark.usefixtures("mini")
def test_the_pixels_of_keras_2_are_kept(version, tmp_path):
    """Until 2.8, the published variance was a deviation in truth, and nothing corrected it."""
    model = ke.EfficientNetB0(weights=None, classes=5)
    path = ke.weights.export(model, tmp_path / "x.h5")
    deviation = np.array([0.229, 0.224, 0.225])
    with h5py.File(path, "a") as file:
        file.attrs["keras_version"] = version
        file["normalization/normalization/mean:0"][...] = [0.485, 0.456, 0.406]
        file["normalization/normalization/variance:0"][...] = deviation
    ke.weights.convert_file(path, tmp_path / "x.keras")
    layer = keras.saving.load_model(tmp_path / "x.keras").get_layer("preprocessing")
    root = np.sqrt(deviation)
    np.testing.assert_allclose(
        np.ravel(layer.scale), 1 / (255 * (root if version == "2.4.0" else deviation)), rtol=1e-6
    )


def test_a_pickled_module_says_how_to_save_its_weights(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        ke.weights.convert_file(tmp_path / "module.pth", tmp_path / "x.keras")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "drop-background-class"])
def test_layouts_are_inverses(name):
    rank = {"OI->IO": 2}.get(name, 5 if name.startswith("E(") else 4)
    ours, layout = np.random.default_rng(0).random((2, 3, 4, 5, 6)[:rank]), LAYOUTS[name]
    foreign = layout.from_keras(ours)
    assert np.array_equal(layout.to_keras(foreign, ours.shape), ours)
    assert np.array_equal(layout.from_keras(layout.to_keras(foreign, ours.shape)), foreign)
    if name.startswith("E("):
        for wrong in (foreign.T, foreign.ravel(), foreign[:, 1:], foreign.reshape(4, -1)):
            with pytest.raises(ValueError, match="one flat kernel per expert"):
                layout.to_keras(wrong, ours.shape)


def broken(tensors, kind):
    """Returns a copy of a state dict with one fault."""
    tensors = dict(tensors)
    if kind == "missing":
        del tensors["_conv_head.weight"]
    elif kind == "unexpected":
        tensors["_conv_extra.weight"] = np.zeros(1)
    elif kind == "shape":
        tensors["_conv_head.weight"] = tensors["_conv_head.weight"][1:]
    elif kind == "rank":
        tensors["_conv_head.weight"] = tensors["_conv_head.weight"].ravel()
    elif kind == "nan":
        tensors["_bn1.weight"] = np.full_like(tensors["_bn1.weight"], np.nan)
    return tensors


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "- _conv_head.weight (for top_conv/kernel)"),
        ("unexpected", "+ _conv_extra.weight"),
        ("shape", "received (1, 1, 40, 1279)"),
        ("rank", "received (51200,)"),
        ("nan", "received 1280 others"),
    ],
)
@pytest.mark.usefixtures("mini")
def test_a_load_is_all_or_nothing(kind, told, tmp_path):
    model = ke.EfficientNetLite0(weights=None)
    before = model.get_weights()
    tensors = {name: np.ascontiguousarray(value) for name, value in broken(lukemelas_tensors(), kind).items()}
    path = save_torch(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="missing") as caught:
        ke.weights.load(model, path)
    assert told in str(caught.value)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


def test_a_published_file_is_recognised_by_its_hash(lite0, lite0_path):
    by_path, by_tag = ke.EfficientNetLite0(weights=lite0_path), lite0
    assert by_path.weights_record == by_tag.weights_record == registry.find("efficientnet-lite0", "imagenet")
    with pytest.warns(UserWarning, match="The classifier is new.* has none for 5 classes"):
        ke.EfficientNetLite0(weights=lite0_path, classes=5)


def test_a_body_loads_from_a_file_with_a_top(lite0, lite0_path):
    whole, body = lite0, ke.EfficientNetLite0(include_top=False, weights=lite0_path)
    assert same_weights(keras.Model(whole.inputs, whole.get_layer("top_activation").output), body)


@pytest.mark.usefixtures("shallow")
def test_layers_around_a_model_are_left_alone(tmp_path):
    path = save_torch(lukemelas_tensors(), tmp_path / "lite0.safetensors")
    plain = ke.EfficientNetLite0(include_top=False, weights=path)
    inputs = keras.Input((64, 64, 1))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 1, name="my_stem_conv")(inputs))
    adapted = ke.EfficientNetLite0(include_top=False, weights=None, input_tensor=keras.layers.Rescaling(2.0)(x))
    second = ke.EfficientNetLite0(include_top=False, weights=None, input_tensor=x, name="second")
    joined = keras.Model(inputs, [adapted.output, keras.layers.Dense(3, name="out")(second.output)])
    for prefix in ("", "second_"):
        ke.weights.load(joined, path, prefix=prefix)
        for layer in plain.layers:
            if layer.get_weights():
                assert all(
                    map(np.array_equal, layer.get_weights(), joined.get_layer(prefix + layer.name).get_weights())
                )
    with pytest.raises(ValueError, match=r"exactly one EfficientNet\. Received: .* with 2\."):
        ke.weights.load(joined, path)
    headed = keras.Model(plain.inputs, keras.layers.Dense(3, name="out")(plain.output))
    ke.weights.load(headed, path)
    assert set(ke.features(headed).output) == {f"reduction_{n}" for n in range(1, 6)}


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("statistics", [([0.0] * 3, [1.0] * 3), ([0.4, 0.5, 0.6], [0.04, 0.05, 0.06])])
@pytest.mark.parametrize("ending", leading([".keras", ".h5"], 1))
def test_a_file_of_keras_applications_keeps_its_pixels(ending, statistics, tmp_path):
    """Its net depends on its weights: without any, pixels are divided by 255 alone."""
    theirs = applications_b0(classes=5, input_shape=(32, 32, 3))
    (normalization,) = (layer for layer in theirs.layers if isinstance(layer, keras.layers.Normalization))
    normalization.set_weights([*map(np.array, statistics), np.array(0)])
    normalization.finalize_state()
    path = tmp_path / f"b0{ending}"
    trained(theirs).save(path)
    ours = ke.EfficientNetB0(weights=path, classes=5, input_shape=(32, 32, 3))
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(run(ours, x), run(theirs, x), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="'auto' selects it"):
        ke.EfficientNetB0(weights=path, classes=5, input_shape=(32, 32, 3), preprocessing="imagenet")


def test_arguments_are_checked_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(store, "locate", lambda *args: pytest.fail("it looked for the file"))
    for wrong in (
        {"classes": 0},
        {"include_top": False, "pooling": "mean"},
        {"dtype": "bfloat17"},
        {"input_shape": (3, 3)},
        {"dropout_rate": 2},
        {"preprocessing": "tpu127"},
        {"classifier_activation": "relu"},
        {"data_format": "NHWC"},
    ):
        with pytest.raises(ValueError, match="Received"):
            ke.EfficientNetB0(**wrong)


@pytest.mark.usefixtures("mini")
def test_own_files_with_nan_change_nothing(tmp_path):
    model = ke.EfficientNetLite0(weights=None)
    before = model.get_weights()
    model.get_layer("top_bn").gamma.assign(np.full(1280, np.nan, "float32"))
    model.save_weights(tmp_path / "x.weights.h5")
    model.set_weights(before)
    with pytest.raises(ValueError, match="expected finite numbers, received 1280 others"):
        ke.weights.load(model, tmp_path / "x.weights.h5")
    assert all(map(np.array_equal, model.get_weights(), before))


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.usefixtures("mini")
def test_own_files_load_by_path_and_carry_their_preprocessing(suffix, tmp_path):
    path = tmp_path / f"b0{suffix}"
    saved = fill(ke.EfficientNetB0(weights=None, preprocessing="inception", classes=5))
    saved.save(path) if suffix == ".keras" else saved.save_weights(path)
    loaded = ke.EfficientNetB0(weights=path, classes=5)
    assert same_weights(saved, loaded)
    scheme = ke.describe(loaded)["preprocessing"]
    assert scheme == ("inception" if suffix == ".keras" else "imagenet")
    if suffix == ".keras":
        with pytest.raises(ValueError, match="'inception', which these weights were trained with"):
            ke.EfficientNetB0(weights=path, classes=5, preprocessing="imagenet")
        assert ke.describe(ke.EfficientNetB0(weights=path, classes=5, preprocessing=None))["preprocessing"] is None


@pytest.mark.usefixtures("mini")
@pytest.mark.parametrize("suffix", leading([".weights.h5", ".keras"], 1))
@pytest.mark.parametrize("fault", ["other model", "other classes", "truncated", "text"])
def test_own_files_that_do_not_fit_change_nothing(suffix, fault, tmp_path):
    path = tmp_path / f"x{suffix}"
    other = ke.create_model(
        "efficientnet-b2" if fault == "other model" else "efficientnet-b0",
        weights=None,
        classes=5,
        input_shape=(32, 32, 3),
    )
    other.save(path) if suffix == ".keras" else other.save_weights(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    if fault == "text":
        path.write_text("hello")
    model = ke.EfficientNetB0(weights=None, classes=6 if fault == "other classes" else 5, input_shape=(32, 32, 3))
    before = model.get_weights()
    told = {
        "other model": "Expected exactly the tensors of 'efficientnet-b0'.*missing",
        "other classes": r"include_top=False.*expected shape \(1280, 6\)",
        "truncated": r"Expected (a \.keras|an h5) file|Expected an archive|Expected weights as",
        "text": "first bytes are b'hello'",
    }[fault]
    with pytest.raises(ValueError, match=told):
        ke.weights.load(model, path)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="one backend writes the file")
@pytest.mark.usefixtures("shallow")  # at full depth: test_keras_applications_loads_what_was_exported
@pytest.mark.parametrize("include_top", leading([True, False], 1))
def test_an_h5_of_keras_applications_loads(include_top, tmp_path):
    theirs = applications_b0(include_top=include_top)
    ours = fill(ke.EfficientNetB0(weights=None, include_top=include_top))
    for layer in ours.layers:
        if layer.weights:
            theirs.get_layer(layer.name).set_weights(layer.get_weights())
    path = tmp_path / "b0.h5"
    theirs.save(path)
    loaded = ke.EfficientNetB0(weights=str(path), include_top=include_top)
    assert same_weights(ours, loaded)
    with h5py.File(path, "r+") as file:
        del file["model_weights"]["top_conv"]
    with pytest.raises(ValueError, match="structure"):
        ke.weights.load(loaded, path)
