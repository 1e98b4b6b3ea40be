"""The processor of a multimodal model from its folder: the class transformers has for it, with parts that need no
torchvision.

A processor from here makes the same features on every machine: image processors are the Pillow ones, and frames of
videos go through the model's image processor (`models/frames.py`), since transformers' video processors and fast image
processors need a torchvision of the very build of torch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from rayswift.errors import ConfigError
from rayswift.models.frames import video_processor
from rayswift.models.loading import load_config, load_tokenizer, local_folder, refusals_named

_PROCESSOR, _PREPROCESSOR, _VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

_ONE_LISTENS = Lock()
"""A server's threads share a processor."""


def has_processor(path: str) -> bool:
    """Whether the folder is that of a model which takes more than text."""
    folder = local_folder(path, weights=False)
    return any((folder / name).exists() for name in (_PROCESSOR, _PREPROCESSOR))


def load_processor(path: str, *, field: str = "model.path") -> Any:
    """The processor of a folder or hub id. Raises ConfigError when it has none that can be built here."""
    folder = local_folder(path, weights=False, field=field)
    given = {name: _read(folder / name) for name in (_PROCESSOR, _PREPROCESSOR, _VIDEO)}
    with refusals_named(path, field):
        cls = _class(str(folder), given, field)
        parts = {name: _part(name, folder, given) for name in cls.get_attributes()}
        if "video_processor" in parts:
            settings = given[_PROCESSOR].get("video_processor") or given[_VIDEO]
            model_type = load_config(str(folder)).model_type
            parts["video_processor"] = video_processor(parts["image_processor"], settings, model_type)
        accepted = inspect.signature(cls.__init__).parameters
        own = {k: v for k, v in given[_PROCESSOR].items() if k in accepted and k not in parts and k != "chat_template"}
        return cls(**parts, **own)


def _class(folder: str, given: Mapping[str, dict[str, Any]], field: str) -> Any:
    """transformers' class for the folder, made to take our parts and to tell the text it hands to its tokenizer."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    tokenizer = _read(Path(folder) / "tokenizer_config.json")
    named = [one.get("processor_class") for one in (given[_PROCESSOR], given[_PREPROCESSOR], tokenizer)]
    model_type = load_config(folder, field=field).model_type
    name = next(filter(None, named), None) or PROCESSOR_MAPPING_NAMES.get(model_type)
    found = getattr(transformers, str(name), None)
    if found is None:
        raise ConfigError(
            "has no processor that transformers knows", path=field, value=folder, fix="use the model's whole folder"
        )
    return type(found.__name__, (_Heard, found), {"__doc__": found.__doc__})


class _Heard:
    """Mixed into a processor: takes parts that are not of transformers' classes, and notes the texts it tokenizes."""

    tokenizer: Any

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Any part will do: ours are made for it."""
        return type(argument)

    def validate_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: one medium is given at a time, with its own placeholder."""

    @contextmanager
    def heard(self) -> Iterator[list[str]]:
        """The texts that are handed to the tokenizer in this block, placeholders filled in."""
        with _ONE_LISTENS:
            tokenizer = self.tokenizer
            ear = _Ear(tokenizer)
            self.tokenizer = ear
            try:
                with warnings.catch_warnings():  # InternVL's has numpy sum a tensor of torch, which works
                    warnings.filterwarnings("ignore", "__array_wrap__", DeprecationWarning)
                    yield ear.texts
            finally:
                self.tokenizer = tokenizer


class _Ear:
    """A tokenizer that notes what it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **kwargs)


def _part(name: str, folder: Path, given: Mapping[str, dict[str, Any]]) -> Any:
    if name == "tokenizer":
        return load_tokenizer(str(folder))
    if name == "image_processor":
        return _image_processor(folder, given)
    if name == "feature_extractor":
        from transformers import AutoFeatureExtractor

        config = given[_PROCESSOR].get(name) or given[_PREPROCESSOR]
        kind = config.get("feature_extractor_type")
        if kind is None:
            return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        import transformers

        return getattr(transformers, kind).from_dict(config)
    if name == "video_processor":
        return None
    raise ValueError(f"its processor has a part that cannot be loaded here: {name}")


def _image_processor(folder: Path, given: Mapping[str, dict[str, Any]]) -> Any:
    """The Pillow image processor that the folder names, whatever backend it was saved from."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    config = given[_PROCESSOR].get("image_processor") or given[_PREPROCESSOR]
    name = str(config.get("image_processor_type") or "")
    name = name.removesuffix("Fast").removesuffix("Pil")
    model_type = load_config(str(folder)).model_type
    backends = IMAGE_PROCESSOR_MAPPING_NAMES
    owner = next((key for key, one in backends.items() if one.get("torchvision") == name), model_type)
    pil = backends.get(owner, {}).get("pil")
    if pil is None:
        raise ValueError(f"its image processor {name or '(unnamed)'} has no variant that works without torchvision")
    return _pillow_class(pil).from_dict(config)


def _pillow_class(name: str) -> Any:
    """The class of that name. Some are marked as if they needed torchvision, and do not: their module has them."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    found = getattr(transformers, name)
    if "torchvision" not in getattr(found, "_backends", ()):
        return found
    for model_type in (key for key, one in IMAGE_PROCESSOR_MAPPING_NAMES.items() if one.get("pil") == name):
        module_name = f"transformers.models.{model_type}.image_processing_pil_{model_type}"
        if importlib.util.find_spec(module_name) is not None:
            return getattr(importlib.import_module(module_name), name)
    raise ValueError(f"its image processor {name} needs torchvision")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
