"""The data in a page of the report."""

import base64
import gzip
import json
import re


def packed(page, name):
    """The data that the page's script would unpack."""
    match = re.search(rf'<script type="text/plain" id="packed-{name}">([^<]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(match[1])))
