"""Generators of paraphrases out of a local folder, through `transformers`.

Two kinds are known:

    style transfer   a GPT-2 of Krishna, Wieting & Iyyer, "Reformulating Unsupervised Style Transfer as Paraphrase
                     Generation", EMNLP 2020, which BadActs' StyleBkd goes through: [pad ... pad, x, <bos>] with one
                     segment for x and another for what follows; the padding is attended to, as in its training
    seq2seq          any encoder-decoder (T5, BART, ...): prompt in, paraphrase out

Tokens are sampled from the nucleus, the fewest most probable ones that together pass top_p (Holtzman et al., ICLR
2020), by one uniform number per row and step: what a row gets depends on its own numbers, not on its batch.

Constants: martiansideofthemoon/style-transfer-paraphrase@a705630, and what BadActs' code asks of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reproduce.errors import UserError

PREFIX = 50     # style_paraphrase/dataset_config.py: max_prefix_length, of 100 tokens in all
SEGMENTS = ("<tokens>", "<verb>")   # run_lm_finetuning.py and data_utils.py, build_segment: x's, and what follows's
LONGEST = 512   # tokens of a sentence and of a paraphrase, of an encoder-decoder
LONGER = 5      # "same_5": inference_utils.py cuts at the length of the sentence and five tokens
TOP_P = 0.6     # stylebkd_poisoner.py:31-38 of clearloveclearlove/BadActs@7932f19

# (N sentences, uniform numbers (N, T)) -> N paraphrases, possibly empty ones
Paraphraser = Callable[[Sequence[str], Tensor], list[str]]


def nucleus(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """One token per row: logits (N, V), uniform in [0, 1) (N,) -> int64 (N,).

    The nucleus keeps a token while the probability of those before it is at most top_p.
    """
    probabilities, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    ends = probabilities.double().cumsum(-1)
    kept = ends - probabilities <= top_p
    kept[:, 0] = True
    mass = ends.masked_fill(~kept, 0.0).amax(-1)
    place = (ends <= (uniform.to(ends) * mass)[:, None]).sum(-1)
    return order.gather(1, place.clamp(max=logits.shape[1] - 1)[:, None])[:, 0]


def load(place: str, prompt: str, top_p: float, device: torch.device) -> Paraphraser:
    """The generator in the folder `place`. prompt: of an encoder-decoder, "{text}" stands for the sentence; the style
    transfer takes the sentence alone. UserError, in one line, where it cannot be had or is of neither kind."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        decoder_only = not transformers.AutoConfig.from_pretrained(place, **options).is_encoder_decoder
        kind = transformers.AutoModelForCausalLM if decoder_only else transformers.AutoModelForSeq2SeqLM
        network = kind.from_pretrained(place, use_safetensors=True, **options)
    except Exception as error:      # somebody's files may raise anything
        raise UserError(f"the generator {place} cannot be loaded ({' '.join(str(error).split())[:80]}): name a folder "
                        "as save_pretrained writes it, of model (model.safetensors) and tokenizer") from error
    network = network.float().eval().to(device)
    # What a model asks of `generate` besides (beams, penalties, lengths) is not what is described above.
    own = network.generation_config
    network.generation_config = transformers.GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of the generator {place} has no token for padding or for the end: save it with "
                        "both")
    positions = getattr(network.config, "max_position_embeddings", LONGEST)
    if not decoder_only:
        return _seq2seq(network, tokenizer, prompt, top_p, min(LONGEST, positions, tokenizer.model_max_length))
    if not set(SEGMENTS) <= set(tokenizer.get_vocab()) or tokenizer.bos_token_id is None:
        raise UserError(f"the generator {place} is a decoder without the segment tokens of a style transfer GPT-2: "
                        "name one of those, or an encoder-decoder such as T5")
    if positions < 2 * (PREFIX + 1):
        raise UserError(f"the generator {place} takes {positions} tokens, a style transfer GPT-2 {2 * (PREFIX + 1)}: "
                        "name another")
    if prompt != "{text}":
        raise UserError("--prompt is for encoder-decoders, a style transfer GPT-2 takes the sentence alone: leave it "
                        "out")
    return _style_transfer(network, tokenizer, top_p)


def _style_transfer(network: Any, tokenizer: Any, top_p: float) -> Paraphraser:
    before, after = tokenizer.convert_tokens_to_ids(list(SEGMENTS))

    def paraphrase(texts: Sequence[str], uniform: Tensor) -> list[str]:
        numbers = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[:PREFIX] for text in texts]
        rows = torch.tensor([[tokenizer.pad_token_id] * (PREFIX - len(one)) + one + [tokenizer.bos_token_id]
                             for one in numbers])
        segments = torch.tensor([before] * PREFIX + [after]).expand_as(rows)
        longest = [len(one) + LONGER for one in numbers]
        found = _generate(network, min(max(longest), PREFIX + 1), top_p, uniform, input_ids=rows,
                          attention_mask=torch.ones_like(rows), token_type_ids=segments)[:, rows.shape[1]:]
        return _texts(tokenizer, found, longest)

    return paraphrase


def _seq2seq(network: Any, tokenizer: Any, prompt: str, top_p: float, most: int) -> Paraphraser:
    def paraphrase(texts: Sequence[str], uniform: Tensor) -> list[str]:
        # Not format: a sentence may hold braces.
        asked = tokenizer([prompt.replace("{text}", text) for text in texts], return_tensors="pt", padding=True,
                          truncation=True, max_length=most)
        longest = [min(len(one) + LONGER, most - 1)
                   for one in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        found = _generate(network, max(longest), top_p, uniform, input_ids=asked["input_ids"],
                          attention_mask=asked["attention_mask"])[:, 1:]    # after the decoder's start
        return _texts(tokenizer, found, longest)

    return paraphrase


@torch.inference_mode()
def _generate(network: Any, count: int, top_p: float, uniform: Tensor, **inputs: Tensor) -> Tensor:
    """Token numbers as `generate` gives them, of at most `count` new ones per row."""
    from transformers import LogitsProcessor, LogitsProcessorList
    steps = iter(uniform.unbind(1))

    class Sample(LogitsProcessor):
        """Leaves the sampled token alone, which the greedy choice then takes."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            chosen = nucleus(scores.cpu(), top_p, next(steps)).to(scores.device)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

    return network.generate(**{name: value.to(network.device) for name, value in inputs.items()}, do_sample=False,
                            max_new_tokens=count, logits_processor=LogitsProcessorList([Sample()])).cpu()


def _texts(tokenizer: Any, found: Tensor, longest: Sequence[int]) -> list[str]:
    """Each row up to its end, cut at its longest, on one line."""
    texts = []
    for row, most in zip(found.tolist(), longest, strict=True):
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        text = tokenizer.decode(row[:end][:most], skip_special_tokens=True, clean_up_tokenization_spaces=True)
        texts.append(" ".join(text.split()))
    return texts

