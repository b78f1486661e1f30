"""What needs an import of hf_focus, what needs PEFT, and the names that are public."""

from pathlib import Path

from bare import Bare
from tiny import TINY
from tiny_adapters import adapted, lora_config

import hf_focus


def test_a_reader_needs_hf_focus_and_no_other_import(tmp_path: Path, bare: Bare) -> None:
    adapted("llama", lora_config()).save_pretrained(tmp_path / "lora")
    adapted("llama").save_pretrained(tmp_path / "alone")
    TINY["llama"].build().save_pretrained(tmp_path / "base")
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "def load(folder):\n"
        "    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    return type(PeftModel.from_pretrained(base, folder).base_model).__name__\n"
        "for folder in sys.argv[2:]:\n"
        "    try: print(load(folder))\n"
        "    except KeyError as error: print(error)\n"
        "import hf_focus\n"
        "print(*map(load, sys.argv[2:]))\n"
    )
    done = bare.run(script, tmp_path / "base", tmp_path / "lora", tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["'FOCUS_LORA'", "'FOCUS'", "FocusLoraModel", "FocusAdapterModel"]


def test_peft_is_optional(bare: Bare) -> None:
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "import hf_focus; hf_focus.FocusConfig()\n"
        "try: hf_focus.FocusAdapterConfig\n"
        "except ImportError as error: print(error)\n"
        "try: hf_focus.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = bare.run(script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "peft" in lines[0]
    assert lines[1] == "module 'hf_focus' has no attribute 'nothing'"


def test_names_are_public() -> None:
    for name in ("FocusAdapterConfig", "FocusAdapterModel", "FocusLoraConfig", "FocusLoraModel"):
        assert getattr(hf_focus, name).__name__ == name
