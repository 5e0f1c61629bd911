"""Exit with 0 if the server in this container says that it is healthy."""

import os
import sys
import urllib.request

# Empty is as good as unset, as for the entrypoint.
host = os.environ.get("HOST") or "0.0.0.0"
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
address = f"[{host}]" if ":" in host else host
url = f"http://{address}:{os.environ.get('PORT') or '8000'}/health"
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
try:
    with opener.open(url, timeout=5) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except OSError as error:
    sys.exit(f"{url}: {error}")
