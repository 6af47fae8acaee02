#!/usr/bin/env bash
# A T5 whose tokenizer.json lower-cases what it reads, as its model was trained on.
#
# Guess: T5Tokenizer and AutoTokenizer apply the rules that tokenizer.json holds, as the tokenizers
# library does with the same file.
# Behaviour: transformers 5 takes the vocabulary (and a Precompiled table of characters, where there
# is one) from the file and builds T5's own rules around it. Other normalizers (Lowercase, NFKC,
# Replace) and the pre-tokenizer are left out, and nothing is said. Capitals become <unk>.
# Met by: a text encoder of a text-to-image model that was trained with a T5-like tokenizer of its
# own (lower-cased captions): "A Red Square" is conditioned on unknown tokens, "a red square" is fine,
# so that validation prompts in lower case hide it. Saving the loaded tokenizer then writes the file
# without the rules.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, T5Tokenizer

words = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁square", *"abcdefghijklmnopqrstuvwxyz"]
made = Tokenizer(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=2))
made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
made.pre_tokenizer = pre_tokenizers.Metaspace()
made.post_processor = processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
)
folder = Path("t5")
folder.mkdir()
made.save(str(folder / "tokenizer.json"))
about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
about |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
(folder / "tokenizer_config.json").write_text(json.dumps(about))
(folder / "config.json").write_text(json.dumps({"model_type": "t5"}))

caption = "A Red Square"
guess = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(caption).tokens
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
print("guess, and tokenizers itself:", guess)
assert guess == ["▁a", "▁red", "▁square", "</s>"]
for reader in (T5Tokenizer, AutoTokenizer):
    tokenizer = reader.from_pretrained(folder)
    found = tokenizer.convert_ids_to_tokens(tokenizer(caption).input_ids)
    print(f"{reader.__name__}:", found, "normalizer:", tokenizer.backend_tokenizer.normalizer)
    assert found != guess and "<unk>" in found, "the rules are applied now"
    assert tokenizer.backend_tokenizer.normalizer is None
tokenizer.save_pretrained("again")
kept = json.loads(Path("again/tokenizer.json").read_text())["normalizer"]
print("saved again, the normalizer is", kept)
assert kept is None
PYTHON
