"""Run llama.cpp's own converter: `upstream_converter.py SOURCE MODEL FOLDER OUTTYPE...`.

The converter looks up the pre-tokenizer by a hash of known tokenizers, which a tiny tokenizer is not. This lookup and
the attempt to read a sentencepiece model are replaced here; everything else is the converter's.
"""

import sys

source, model, folder, *outtypes = sys.argv[1:]
sys.path[:0] = [f"{source}/gguf-py", source]

from conversion import base, granite

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
granite.GraniteSwitchModel.set_vocab = lambda self: self._set_vocab_gpt2()

import convert_hf_to_gguf

for outtype in outtypes:
    sys.argv = ["convert", model, "--outfile", f"{folder}/{outtype}.gguf", "--outtype", outtype]
    convert_hf_to_gguf.main()
