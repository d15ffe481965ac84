"""Video codecs: pixels to latents and back.

``patchify`` is lossless and built in, ``ltx`` is LTX-Video's autoencoder, ``text`` encodes captions with T5, and
``video_file`` reads and writes video files. Every codec implements ``Codec``; ``build_codec`` builds one.
"""

from flowception.codecs.base import Codec, CodecConfig
from flowception.codecs.build import build_codec

__all__ = ["Codec", "CodecConfig", "build_codec"]
