"""Captioners of random weights, in folders of transformers' own formats."""

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *string.ascii_lowercase]
SIDE = 16
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 2, "initializer_range": 0.3}
EYE = {**TOWER, "image_size": SIDE, "patch_size": 8}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def letters(*more):
    """A tokenizer of single letters, with special tokens as of BART, and further ones."""
    named = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*named, *more, *string.ascii_lowercase, " "])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    return tokenizer, vocab


def blip(out):
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)}, bos_token="[DEC]")
    text = {**TOWER, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 5}
    text |= {"eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=EYE))
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, **HALF)
    return save(out, model, BlipProcessor(pictures, tokenizer))


def blip2(out):
    raw, vocab = letters("<image>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": len(vocab), "word_embed_proj_dim": 16}
    text |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "init_std": 0.3}
    text |= {"max_position_embeddings": 256}
    former = {**TOWER, "encoder_hidden_size": 16, "vocab_size": 30}
    config = Blip2Config(
        vision_config=EYE, qformer_config=former, text_config=text, num_query_tokens=4
    )
    config.image_token_index = config.image_token_id = vocab["<image>"]
    model = Blip2ForConditionalGeneration(config)
    pictures = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, **HALF)
    return save(out, model, Blip2Processor(pictures, tokenizer, num_query_tokens=4))


def llava(out):
    raw, vocab = letters("<image>", "USER:", "ASSISTANT:")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **SPECIAL, extra_special_tokens={"image_token": "<image>"}
    )
    text = {**TOWER, "model_type": "llama", "vocab_size": len(vocab)}
    text |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config={**EYE, "model_type": "clip_vision_model", "projection_dim": 16},
        text_config=text,
        image_token_id=vocab["<image>"],
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **HALF
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    return save(out, LlavaForConditionalGeneration(config), processor)


def florence2(out):
    raw, vocab = letters("<image>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **SPECIAL, extra_special_tokens={"image_token": "<image>"}
    )
    text = {"model_type": "bart", "vocab_size": len(vocab), "d_model": 16, "encoder_layers": 1}
    text |= {"decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
    text |= {"max_position_embeddings": 256, "bos_token_id": 0, "pad_token_id": 1}
    text |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    eye = {"depths": [1], "patch_size": [4], "patch_stride": [4], "patch_padding": [0]}
    eye |= {"embed_dim": [16], "num_heads": [2], "num_groups": [2], "window_size": 2}
    eye |= {"patch_prenorm": [False], "projection_dim": 16, "max_position_embeddings": 16}
    config = Florence2Config(text_config=text, vision_config=eye, image_token_id=vocab["<image>"])
    pictures = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_seq_length=17, **HALF
    )
    processor = Florence2Processor(pictures, tokenizer, num_additional_image_tokens=1)
    return save(out, Florence2ForConditionalGeneration(config), processor)


def encoder_decoder(out):
    """With a processor of pictures and a tokenizer, each in files of its own."""
    raw, vocab = letters()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)
    text = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": len(vocab), "n_positions": 64}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**EYE), GPT2Config(**text)
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    model = VisionEncoderDecoderModel(config)
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=1, eos_token_id=2)
    pictures = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, **HALF)
    tokenizer.save_pretrained(out)
    return save(out, model, pictures)


def save(out, model, processor):
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


KINDS = {"blip": blip, "blip-2": blip2, "florence2": florence2, "llava": llava}
KINDS |= {"vision-encoder-decoder": encoder_decoder}


def written(kind, out):
    """A folder of a captioner of this kind, with random weights."""
    torch.manual_seed(0)
    return KINDS[kind](out)
