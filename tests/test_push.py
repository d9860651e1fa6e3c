"""``push``: an exported folder reaches a hub whole; what the hub refuses is a sentence.

The hub is a server of this test that speaks the part of the hub's API that an upload uses.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from proxykd_jax import push
from tests.tiny_run import copy_run, files_of

TOKEN = "hf_of_this_test"


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory: name -> private, and files by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0]
        self.answer({"id": name, "sha": "0" * 40, "siblings": [], "private": True, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            name = f"{owner}/{asked['name']}"
            self.server.private[name] = asked.get("private", asked.get("visibility") == "private")
            self.answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": each["path"], **mode} for each in asked]})
        elif self.path == "/api/validate-yaml":  # the card's front matter
            self.answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.server.messages.append(value["summary"])
                else:
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            oid = "1" * 40
            url = f"{self.server.url}/{name}/commit/{oid}"
            self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"error": f"no {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api

    found = Hub()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(hf_api, "ENDPOINT", found.url, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield found
    found.shutdown()


def test_an_exported_student_arrives_whole(finished_run, hub, capsys):
    folder = finished_run.folder / "export" / "student"
    assert push.command([str(folder), "--to", "me/small-student"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/small-student/commit/")
    assert hub.private == {"me/small-student": True}
    sent = {name: content for name, (content, _) in files_of(folder).items()}
    assert hub.files == sent and "README.md" in sent
    assert hub.messages == ["Upload student with proxykd push"]


def test_what_is_not_taken_is_a_sentence(finished_run, hub, tmp_path, monkeypatch, capsys):
    folder = finished_run.folder / "export" / "student"
    run = copy_run(finished_run, tmp_path / "runs")
    damaged = run.folder / "export" / "student"
    (damaged / "config.json").write_text("{}")

    def refused(*arguments: str) -> str:
        assert push.command([*arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and "Traceback" not in err
        return err

    assert "holds no README.md" in refused(str(tmp_path), "--to", "me/x")
    assert "is damaged" in refused(str(damaged), "--to", "me/x")
    assert "a repository is named owner/name" in refused(str(folder), "--to", "not a name")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    said = refused(str(folder), "--to", "me/x")
    assert "does not let you write to me/x" in said and "hf_other" not in said
    hub.shutdown()
    hub.server_close()
    assert hub.files == {}
