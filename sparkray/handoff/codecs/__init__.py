"""How rows are written on the wire: `encode_rows` and `decode_rows`, by name; `choose_codec` picks the name."""

from sparkray.handoff.codecs.choose import CodecRates, choose_codec, measure_codecs
from sparkray.handoff.codecs.table import decode_rows, encode_rows

__all__ = ["CodecRates", "choose_codec", "decode_rows", "encode_rows", "measure_codecs"]
