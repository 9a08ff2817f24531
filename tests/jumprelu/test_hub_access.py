"""The hub's errors, against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import errors

from jumprelu.hub_access import hub_access
from tests.models import save_tiny

TOKEN = "hf_secretsecretsecret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, by the name of the repository's owner; the body and headers repeat
    the token, to tempt."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        seen = self.headers.get("Authorization", "")
        answers = {
            "gated": (
                403,
                {"X-Error-Code": "GatedRepo", "X-Error-Message": f"ask for access, {seen}"},
            ),
            "missing": (
                404,
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": f"Repository not found {seen}"},
            ),
            "private": (401, {"X-Error-Code": "RepoNotFound"}),
            "expired": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "forbidden": (403, {"X-Error-Message": f"no {seen}"}),
            "moved": (404, {"X-Error-Code": "RevisionNotFound"}),
            "teapot": (418, {}),
        }
        if "/works/model" in self.path:
            self.send_file(self.path.partition("?")[0])
            return
        owner = next((name for name in answers if f"/{name}/" in self.path), None)
        if owner is None:  # hang up
            self.close_connection = True
            return
        status, headers = answers[owner]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, path: str) -> None:
        """The answers to a download of `works/model`: revision, list of files, file."""
        files = self.server.files
        size = [
            {"type": "file", "path": name, "size": len(data), "oid": name}
            for name, data in files.items()
        ]
        if "/tree/" in path:
            body = json.dumps(size).encode()
        elif "/resolve/" in path:
            body = files[path.split(f"/resolve/{COMMIT}/")[1]]
        else:
            body = json.dumps(
                {"id": "works/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


CHILD = """
import json, sys, traceback
from jumprelu.corpus import load_texts
from jumprelu.lm import load_lm
for name in sys.argv[1:]:
    try:
        if name.startswith("dataset:"):
            load_texts(name[8:], "test")
        else:
            lm = load_lm(name, device="cpu")
            files = sorted(path.name for path in lm.folder.iterdir())
            print(json.dumps([name, "LM", lm.name, files]))
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error), traceback.format_exc()]))
"""


@pytest.fixture(scope="module")
def hub_errors(tmp_path_factory, root):
    """{name: (class, message, traceback)} of loading each repository from the server above, in a
    process of its own."""
    names = [
        f"{owner}/model"
        for owner in (
            "gated",
            "missing",
            "private",
            "expired",
            "forbidden",
            "moved",
            "teapot",
        )
    ]
    names += ["dataset:gated/texts", "dataset:missing/texts", "dropped/model", "works/model"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    folder = save_tiny("llama", tmp_path_factory.mktemp("works"))
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.files |= {
        "onnx/model.safetensors": b"for another framework",
        "pytorch_model.bin": b"a pickle",
        "README.md": b"#",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("home")
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *names],
        env=env,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stderr
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert list(found) == names
    return found


@pytest.mark.parametrize(
    "name, kind, advice",
    [
        (
            "gated/model",
            "PermissionError",
            ["is gated", "Accept the licence", "/gated/model", "hf auth login"],
        ),
        (
            "missing/model",
            "FileNotFoundError",
            ["no model missing/model", "check the spelling", "private"],
        ),
        (
            "private/model",
            "FileNotFoundError",
            ["private one that this login may not see", "hf auth login"],
        ),
        ("expired/model", "PermissionError", ["refused the login", "HTTP 401", "unset HF_TOKEN"]),
        ("forbidden/model", "PermissionError", ["HTTP 403", "hf auth login"]),
        ("moved/model", "FileNotFoundError", ["no such revision"]),
        (
            "teapot/model",
            "ConnectionError",
            ["HTTP 418", "run again", "hf download teapot/model", "HF_HUB_OFFLINE=1"],
        ),
        ("dropped/model", "ConnectionError", ["run again", "local folder instead of the id"]),
        (
            "dataset:gated/texts",
            "PermissionError",
            ["dataset gated/texts is gated", "/datasets/gated/texts"],
        ),
        ("dataset:missing/texts", "FileNotFoundError", ["no dataset missing/texts"]),
    ],
)
def test_the_hubs_errors_say_what_to_do_and_no_token(hub_errors, name, kind, advice):
    found, message, trace = hub_errors[name]
    assert found == kind, trace
    for words in advice:
        assert words in message
    assert TOKEN not in trace and "hf_" not in message


def test_a_hub_model_is_downloaded_and_only_what_is_read(hub_errors):
    kind, name, files = hub_errors["works/model"]
    assert (kind, name) == ("LM", "works/model"), files
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


def explained(error: Exception, kind: str = "model") -> OSError:
    with pytest.raises(OSError) as caught, hub_access("some/repo", kind):
        raise error
    return caught.value


def test_offline_mode_says_how_to_get_a_copy():
    error = explained(errors.OfflineModeIsEnabled("offline"), kind="dataset")
    assert type(error) is ConnectionError
    for words in (
        "HF_HUB_OFFLINE=1 is set",
        "`hf download some/repo --repo-type dataset` once",
        "local folder",
    ):
        assert words in str(error)


@pytest.mark.parametrize(
    "cause",
    [
        OSError("Consistency check failed: file should be of size 5 but has size 3"),
        errors.XetDownloadError("broken pipe"),
    ],
)
def test_an_interrupted_download_says_that_it_goes_on(cause):
    try:
        raise OSError("can't load the model") from cause
    except OSError as wrapped:
        error = explained(wrapped)
    assert type(
        error
    ) is ConnectionError and "interrupted: run again, it goes on where it stopped" in str(error)


@pytest.mark.parametrize(
    "cause",
    [TimeoutError("slow"), ConnectionResetError("reset"), errors.LocalEntryNotFoundError("none")],
)
def test_no_network_is_a_connection_error(cause, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    error = explained(cause)
    assert (
        type(error) is ConnectionError
        and "could not be reached" in str(error)
        and "HTTPS_PROXY" in str(error)
    )


def test_other_errors_pass_unchanged():
    for error in (
        ValueError("mine"),
        KeyError("k"),
        OSError(28, "No space left on device"),
        PermissionError(13, "cache folder"),
    ):
        with pytest.raises(type(error)) as caught, hub_access("some/repo"):
            raise error
        assert caught.value is error
