"""The kinds of numbers that GGUF files are written with, without the library that writes them."""

KINDS = {  # bits a number, with the scale of its block
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8_0": 8.5,
    "q5_1": 6,
    "q5_0": 5.5,
    "q4_1": 5,
    "q4_0": 4.5,
}
