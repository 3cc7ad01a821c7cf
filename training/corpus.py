r"""Text for the tiny demonstration model: documentation pages and Python sources.

    python -m training.corpus --out corpus.jsonl.xz \
        --docs /usr/share/doc --stdlib <python Lib folder>

``--docs`` is a folder with the unpacked Debian packages named in ``DOCS``;
``--stdlib`` is the Lib folder of a CPython source or installation.  Each line of the
output is one document: {"source", "title", "split", "text"}.  A fixed 2 % of the titles
(chosen by hash) form the held-out split and are never trained on.
"""

import argparse
import hashlib
import importlib
import inspect
import io
import json
import lzma
import re
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

# (Debian package, folder under /usr/share/doc, licence, pages left out)
DOCS = [
    ("python3.11-doc", "python3.11/html", "PSF", r"genindex|whatsnew/changelog|search|py-modindex"),
    ("sqlite3-doc", "sqlite3", "public domain", r"doclist|keyword_index|toc\.html|releaselog|/session/|hlr"),
    ("postgresql-doc-15", "postgresql-doc-15/html", "PostgreSQL", r"bookindex|index\.html"),
    ("python-django-doc", "python-django-doc/html", "BSD-3", r"_modules|genindex|search|py-modindex"),
    ("python-sqlalchemy-doc", "python-sqlalchemy-doc/html", "MIT", r"_modules|genindex|search|changelog"),
    ("python-pandas-doc", "python-pandas-doc/html", "BSD-3", r"_modules|genindex|search|whatsnew|reference/api"),
    ("rust-doc", "rust-doc/html/book", "MIT/Apache-2.0", r"edition|print\.html"),
    ("rust-doc", "rust-doc/html/reference", "MIT/Apache-2.0", r"print\.html"),
    ("rust-doc", "rust-doc/html/nomicon", "MIT/Apache-2.0", r"print\.html"),
    ("rust-doc", "rust-doc/html/edition-guide", "MIT/Apache-2.0", r"print\.html"),
    ("rust-doc", "rust-doc/html/embedded-book", "MIT/Apache-2.0", r"print\.html"),
    ("rust-doc", "rust-doc/html/rust-by-example", "MIT/Apache-2.0", r"print\.html"),
    ("apache2-doc", "apache2-doc/manual/en", "Apache-2.0", r"quickreference|directives|sitemap"),
    ("erlang-doc", "erlang-doc/lib", "Apache-2.0", r"/wx-|jinterface|release_notes|notes\.html|index\.html"),
    ("nodejs-doc", "nodejs/api", "MIT", r"all\.html|index\.html"),
    ("cmake-doc", "cmake-data/html", "BSD-3", r"genindex|search|_sources"),
    ("sphinx-doc", "sphinx-doc/html", "BSD-2", r"_modules|genindex|search|changes"),
    ("llvm-14-doc", "llvm-14-doc/html", "Apache-2.0 WITH LLVM-exception", r"doxygen|genindex|search|ReleaseNotes"),
]
STDLIB_LEFT_OUT = r"/(test|tests|idlelib|lib2to3|site-packages|__pycache__|config-[^/]*)/|encodings/|pydoc_data"

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
BLOCK = {"p", "div", "li", "ul", "ol", "dl", "dt", "dd", "tr", "table", "pre", "section", "article",
         "h1", "h2", "h3", "h4", "h5", "h6", "br", "blockquote"}  # fmt: skip
SKIP_TAGS = {"script", "style", "head", "nav", "footer", "svg", "button", "form", "title"}
SKIP_CLASSES = {"sphinxsidebar", "related", "footer", "headerlink", "navheader", "navfooter", "toc", "menu",
                "mobile-nav", "menu-bar", "nav-wrapper", "bd-sidebar", "bd-sidebar-primary", "bd-toc",
                "toctree-wrapper", "nosearch", "sidebar", "viewcode-link", "prev-next-area",
                "docs-left-navigation", "docs-top-navigation-container", "docs-bottom-navigation"}  # fmt: skip


class TextExtractor(HTMLParser):
    """Visible text of a documentation page, without navigation."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.stack, self.skip_from, self.in_pre = [], [], None, 0

    def handle_starttag(self, tag, attrs):
        if tag in BLOCK:
            self.parts.append("\n")
        if tag in VOID:
            return
        self.stack.append(tag)
        self.in_pre += tag == "pre"
        classes = set((dict(attrs).get("class") or "").split())
        if self.skip_from is None and (tag in SKIP_TAGS or classes & SKIP_CLASSES):
            self.skip_from = len(self.stack)
        if tag == "li" and self.skip_from is None:
            self.parts.append("- ")

    def handle_endtag(self, tag):
        if tag not in self.stack:
            return
        while self.stack:
            top = self.stack.pop()
            self.in_pre -= top == "pre"
            if self.skip_from is not None and len(self.stack) < self.skip_from:
                self.skip_from = None
            if top == tag:
                break
        if tag in BLOCK:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_data(self, data):
        if self.skip_from is None:
            self.parts.append(data if self.in_pre else re.sub(r"\s+", " ", data))


def html_to_text(html):
    parser = TextExtractor()
    parser.feed(html)
    text = "".join(parser.parts).replace("\u00b6", "").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n- *\n+", "\n- ", text)
    text = re.sub(r"\n[ ](?=\S)", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def split_of(title):
    return "heldout" if int(hashlib.sha256(title.encode()).hexdigest(), 16) % 50 == 0 else "train"


def doc_pages(root):
    for package, folder, _, left_out in DOCS:
        for page in sorted((root / folder).rglob("*.html")):
            name = str(page.relative_to(root))
            if page.is_symlink() or re.search(left_out, name):
                continue
            text = html_to_text(page.read_text(encoding="utf-8", errors="replace"))
            if len(text) > 800:
                yield package, name, text


def stdlib_sources(lib):
    for file in sorted(lib.rglob("*.py")):
        name = "/" + str(file.relative_to(lib))
        if re.search(STDLIB_LEFT_OUT, name) or name.startswith("/turtledemo"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if 800 < len(text) < 400_000:
            yield "cpython Lib", "Lib" + name, text


def docstrings():
    """(qualified name, first paragraph) of the standard library's public functions and classes."""
    found = {}
    for module_name in sorted(sys.stdlib_module_names):
        if module_name.startswith("_") or module_name in {
            "antigravity",
            "this",
            "idlelib",
            "lib2to3",
            "turtle",
            "tkinter",
            "distutils",
            "nt",
            "ntpath",
            "pydoc_data",
        }:
            continue
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except Exception:
            continue
        add_docstring(found, module_name, module, "module")
        for name in getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]:
            obj = getattr(module, name, None)
            if inspect.ismodule(obj) or not callable(obj):
                continue
            foreign = getattr(obj, "__module__", module_name) not in (module_name, "_" + module_name, None)
            if foreign and not hasattr(module, "__all__"):  # what __all__ lists is public wherever it was defined
                continue
            prefix = "" if module_name == "builtins" else module_name + "."
            add_docstring(found, prefix + name, obj, "class" if inspect.isclass(obj) else "function")
            if inspect.isclass(obj) and not issubclass(obj, BaseException):
                for method, function in vars(obj).items():
                    if not method.startswith("_") and callable(function):
                        add_docstring(found, f"{prefix}{name}.{method}", function, "method")
    return [{"name": name, "kind": kind, "text": text} for name, (kind, text) in sorted(found.items())]


def add_docstring(found, name, obj, kind):
    doc = inspect.getdoc(obj) or ""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", doc)]
    if paragraphs and re.match(r"^[\w.]+\(.*\)( ->.*)?$", paragraphs[0]) and len(paragraphs) > 1:
        paragraphs = paragraphs[1:]  # the first line was only a signature
    text = re.sub(r"^[\w.]+\([^)]*\) (->\s*[\w\[\], ]+\s)?(--? )?(?=[A-Z])", "", paragraphs[0]) if paragraphs else ""
    if len(text) > 15 and text.isascii() and name not in found:
        if len(text) > 240:
            text = re.split(r"(?<=[.!?]) ", text)[0]
        if len(text) <= 240 and not text.startswith(("x.__", "Built-in immutable")):
            found[name] = (kind, text)


def glossary(root):
    """(term, first sentences) from the Python documentation's glossary page."""
    html = (root / "python3.11/html/glossary.html").read_text(encoding="utf-8")
    for term, body in re.findall(r"<dt[^>]*>(.*?)</dt>\s*<dd>(.*?)</dd>", html, re.S):
        term = re.sub(r"\s+", " ", html_to_text(term)).strip()
        paragraph = re.search(r"<p>(.*?)</p>", body, re.S)
        definition = re.sub(r"\s+", " ", html_to_text(paragraph.group(1))).strip() if paragraph else ""
        sentences = re.split(r"(?<=[.!?]) ", definition)
        answer = sentences[0]
        if len(sentences) > 1 and len(answer) + len(sentences[1]) < 260:
            answer += " " + sentences[1]
        if term and 20 < len(answer) < 320 and answer.isascii():
            yield {"name": term, "kind": "term", "text": answer}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    totals = {}
    with lzma.open(args.out, "wt", encoding="utf-8", preset=4) as out:
        for source, title, text in [*doc_pages(args.docs), *stdlib_sources(args.stdlib)]:
            document = {"source": source, "title": title, "split": split_of(title), "text": text}
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
            count, size = totals.get(source, (0, 0))
            totals[source] = (count + 1, size + len(text))
        for item in [*docstrings(), *glossary(args.docs)]:
            out.write(json.dumps({"source": "docstring", "split": "facts", "title": item["name"], **item}) + "\n")
            count, size = totals.get("docstring", (0, 0))
            totals["docstring"] = (count + 1, size + len(item["text"]))
    for source, (count, size) in totals.items():
        print(f"{source:24} {count:6} documents {size / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()
