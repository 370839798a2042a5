"""Fetches a sentencepiece tokenizer by name into assets/NAME/tokenizer.model, and prints the option that uses it.

python scripts/get_tokenizer.py open-32k       32,000 pieces, from the package mistral-common; checked by SHA-256
python scripts/get_tokenizer.py llama-2        LLaMA-2's, from the Hugging Face hub: accept Meta's licence there, then
                                               give a token in HF_TOKEN, or log in with `hf auth login`
"""

import argparse
import hashlib
import os
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_moe.config.tables import Config
from titan_moe.data import packages
from titan_moe.data.prepare import cache_root
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.errors import UserError, pip_install
from titan_moe.runtime.owner import replacing

ROOT = Path(__file__).resolve().parent.parent
OPEN_FILE = "mistral_common/data/tokenizer.model.v1"
LLAMA_REPOSITORY = "meta-llama/Llama-2-7b-hf"
LLAMA_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


def open_tokenizer() -> bytes:
    """Mistral's first tokenizer (Apache 2.0)."""
    package = packages.wheel(packages.TOKENIZER, cache_root(Config()), "open-32k", "give a model with --tokenizer.path")
    with zipfile.ZipFile(package) as archive:
        return archive.read(OPEN_FILE)


def llama_tokenizer() -> bytes:
    """LLaMA-2's tokenizer, from a repository that asks for a licence. Raises UserError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise UserError(f"llama-2 needs the package huggingface_hub: {pip_install('huggingface_hub')}") from None
    try:
        path = huggingface_hub.hf_hub_download(LLAMA_REPOSITORY, "tokenizer.model")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"llama-2: {LLAMA_REPOSITORY} can't be read ({first}); accept the licence on its page and set HF_TOKEN, or take "
            "open-32k"
        ) from error
    model = Path(path).read_bytes()
    if hashlib.sha256(model).hexdigest() != LLAMA_SHA256:
        raise UserError("llama-2: the downloaded tokenizer.model is not the expected file (SHA-256 differs)")
    return model


SOURCES = {"open-32k": open_tokenizer, "llama-2": llama_tokenizer}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--out", type=Path, help="where to write the model (default: assets/NAME/tokenizer.model)")
    arguments = parser.parse_args()
    path: Path = arguments.out or ROOT / "assets" / arguments.name / "tokenizer.model"
    try:
        model = SOURCES[arguments.name]()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = Tokenizer(model, arguments.name).vocab_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_bytes(model)
    print(f"{size:,} pieces; use it with --tokenizer.path={os.path.relpath(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
