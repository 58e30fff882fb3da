"""Take pictures of what a user sees in a browser: TensorBoard's pages and the report, light and dark.

python docs/screenshots.py         # half a minute; writes docs/pictures/*.png. Needs chromium on the PATH
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from urllib.request import urlopen

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from pictures import FOLDER, NAMES, train
from PIL import Image

from lightning_soaa.run_report import load, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DARK, LIGHT = 0, 1  # of chromium's setting preferredColorScheme
PATIENCE = 60  # seconds
COLOURS = 96  # as many as such pages need, in a third of the bytes


def shoot(url: str, path: Path, *, width: int, height: int, scheme: int = LIGHT) -> None:
    """Write what a browser shows of `url`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is on the PATH")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=15000"),
        *(f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([browser, *options, f"--screenshot={path}", url], check=True, timeout=PATIENCE, **quiet)
    Image.open(path).quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def shoot_tensorboard(logs: Path, folder: Path) -> None:
    """Write the pages of a TensorBoard that runs for as long as that takes."""
    port = free_port()
    address = f"http://localhost:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs.name, "--port", str(port)]
    server = subprocess.Popen(command, cwd=logs.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if b"run" in urlopen(f"{address}/data/runs", timeout=5).read():
                    break
            except OSError:
                pass
            if time.monotonic() > deadline:
                sys.exit("TensorBoard does not answer")
            time.sleep(0.5)
        smooth = "_smoothingWeight=0"
        shoot(f"{address}/#custom_scalars&{smooth}", folder / "tensorboard-page.png", width=1100, height=980)
        filtered = f"{address}/#scalars&tagFilter=trust_region&{smooth}"
        shoot(filtered, folder / "tensorboard-scalars.png", width=1100, height=760)
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write the pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        logs, page = Path(temporary) / "logs", Path(temporary) / "report.html"
        names = ("healthy", "poisoned")
        for name in names:
            train(name, temporary, TensorBoardLogger(logs, name="", version=NAMES[name]))
        shoot_tensorboard(logs, folder)
        write_report(load([logs / NAMES[name] for name in names]), html=page)
        for scheme, name in ((LIGHT, "report-light.png"), (DARK, "report-dark.png")):
            shoot(page.as_uri(), folder / name, width=1120, height=800, scheme=scheme)


if __name__ == "__main__":
    main()
