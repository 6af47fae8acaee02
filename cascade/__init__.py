"""Cascade: text-to-image generation by a chain of conditional generative stages.

A batch is a dictionary; a stage reads some of its keys and writes one. This is the table of them
(b: batch, d: CLIP embedding, n: context length, w: width of the text states).

| key              | value                                                         | written by   |
|------------------|---------------------------------------------------------------|--------------|
| `sample`         | int64 [b], the number that every random draw of a sample uses | data, caller |
| `key`            | list of str, "shard/key" of each sample                       | data         |
| `caption`        | list of str                                                   | data, caller |
| `image_{size}`   | float [b, 3, h, w] in [-1, 1]                                 | data, a stage |
| `clip_image`     | float [b, d], unit norm, or raw if all its stages say so      | CLIP, a prior |
| `clip_text`      | float [b, d], likewise                                        | CLIP         |
| `text`           | float [b, n, w], states of a frozen text encoder              | that encoder |
| `text_mask`      | bool [b, n], true where `text` is a token                     | that encoder |
| `empty`          | a batch of one row, what encoders write for an empty caption  | a stage      |
| `label`          | int64 [b], a class, which the caption names by its number     | `Labels`     |
| `tokens`         | int64 [b, n], zero-padded, for a text encoder trained here    | tokenizer    |
| `original_size`  | int64 [b, 2], height and width of the file of a picture      | data, a stage |
| `crop_corner`    | int64 [b, 2], top and left of its part, once it is resized    | data, a stage |
| `target_size`    | int64 [b, 2], height and width of that part                   | data, a stage |
| `frame_{size}`   | int64 [b, 2], height and width that a base stage is to paint  | caller       |
| `control/NAME_SIZE` | float [b, 3, h, w] in [-1, 1], edges or another condition  | data, caller |
| `control/NAME_weight` | float [b], how much that ControlNet counts; 1 if missing  | caller       |
| `loss_weight`    | float [b], what each sample's loss counts; 1 if missing       | data         |
| `preserved`      | bool [b], whether a sample is to stay as the stage painted it  | data         |
| `x_T`            | float [b, ...], the noise that leads to a picture             | an edit      |
| `known/KEY`      | float [b, 3, h, w], a picture to edit, as KEY is sampled      | an edit      |
| `unknown/KEY`    | bool [b, 1, h, w], what of it to paint                        | an edit      |

What captions are asked with (`encoders.phrases`), and what their encoders make of it:

| key              | value                                                         | written by   |
|------------------|---------------------------------------------------------------|--------------|
| `negative`       | list of str, captions that guidance leads away from           | caller       |
| `phrases`        | list of tuples of `Phrase`, the weighted parts of `caption`   | caller       |
| `negative_phrases` | the same, of `negative`                                     | caller       |
| `text_weights`   | float [b, n], log-weights of `text`; or `tokens_weights`      | an encoder   |
| `lacking`        | a batch of k captions that lack one phrase, and their `share` | an encoder   |
"""
