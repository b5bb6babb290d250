"""Captioned emoji as a webdataset.

    python benchmark/emoji.py OUT.tar

Pictures: the Debian package fonts-noto-color-emoji (OFL), at the only size that font has; names: emoji-test.txt of the
Debian package unicode-data. One picture of 136 x 128 on white for each fully qualified emoji, skin tones left out.
"""

import io
import re
import sys
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "/usr/share/unicode/emoji/emoji-test.txt"
LINE = re.compile(r"^([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)$", re.M)


def main(out: str) -> None:
    font, count = ImageFont.truetype(FONT, 109), 0
    with tarfile.open(out, "w") as shard:
        for codes, name in LINE.findall(Path(NAMES).read_text()):
            if "skin tone" in name:
                continue
            image, content = Image.new("RGB", (136, 128), "white"), io.BytesIO()
            text = "".join(chr(int(code, 16)) for code in codes.split())
            ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
            image.save(content, "PNG")
            for kind, part in (("png", content.getvalue()), ("txt", name.encode())):
                entry = tarfile.TarInfo(f"{count:04d}.{kind}")
                entry.size = len(part)
                shard.addfile(entry, io.BytesIO(part))
            count += 1
    print(f"{out}: {count} emoji")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
