"""OHIF with the MONAI Label panel in a real Chromium, handled as an annotator does."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Page, Request, Response, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Rendering in software, and nothing asked of anybody but this machine.
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--ignore-gpu-blocklist", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
SECONDS = 60.0
VIEWPORTS = 3
MILLIMETRES = 90.0  # half the height of what the axial view shows: a voxel is several of the screen's pixels
SETTLE_MS = 1500  # the panel itself waits a second after it has connected

_LOADED = """count => {
    const service = window.services && window.services.cornerstoneViewportService;
    const engine = service && service.getRenderingEngine();
    const shown = engine ? engine.getViewports().filter(v => v.getImageData && v.getImageData()) : [];
    const volumes = shown.map(v => window.cornerstone.cache.getVolume(v.getVolumeId()));
    return shown.length >= count && volumes.every(v => v && v.loadStatus.loaded);
}"""
_LABEL_MAP = """() => {
    const service = window.services.segmentationService;
    return service.getSegmentations().length > 0 && !!service.getLabelmapVolume('1');
}"""
_UPDATED = "updated the segmentation's scalar data"
_POINTS = """() => window.cornerstoneTools.annotation.state.getAllAnnotations()
    .filter(a => a.metadata.toolName === 'ProbeMONAILabel').map(a => Array.from(a.data.handles.points[0]))"""
_GO_TO = """([world, spread]) => {
    const engine = window.services.cornerstoneViewportService.getRenderingEngine();
    const viewport = engine.getViewports().find(v => v.id.toLowerCase().includes('axial'));
    const camera = viewport.getCamera();
    const position = camera.position.map((x, a) => x + world[a] - camera.focalPoint[a]);
    viewport.setCamera({...camera, focalPoint: world, position, parallelScale: spread});
    engine.getViewports().forEach(v => {
        v.setProperties({voiRange: {lower: -160, upper: 240}});
        v.render();
    });
}"""
_ON_SCREEN = """world => {
    const engine = window.services.cornerstoneViewportService.getRenderingEngine();
    const viewport = engine.getViewports().find(v => v.id.toLowerCase().includes('axial'));
    const [x, y] = viewport.worldToCanvas(world);
    const box = viewport.canvas.getBoundingClientRect();
    return [box.left + x, box.top + y];
}"""
_MASK = """() => {
    const service = window.services.segmentationService;
    const volume = service.getLabelmapVolume('1');
    const values = volume.voxelManager.getCompleteScalarDataArray();
    const set = [], value = [];
    for (let n = 0; n < values.length; n++) if (values[n]) { set.push(n); value.push(values[n]); }
    const segments = Object.values(service.getSegmentations()[0].config.segments);
    return {
        dimensions: Array.from(volume.dimensions), set, value,
        names: Object.fromEntries(segments.map(s => [s.segmentIndex, s.label])),
    };
}"""
_WORLD = """index => Array.from(
    window.services.segmentationService.getLabelmapVolume('1').imageData.indexToWorld(index))"""

# Of the one segmentation among the study's series, read by the page itself from the archive.
_ARCHIVED = """async () => {
    const {displaySetService, segmentationService} = window.services;
    const {cache, metaData} = window.cornerstone;
    const set = displaySetService.getActiveDisplaySets().find(d => d.Modality === 'SEG');
    await set.load({headers: {}});
    const found = segmentationService.getSegmentation(set.displaySetInstanceUID);
    const slices = found.representationData.Labelmap.imageIds.map(id => cache.getImage(id)).map(image => {
        const values = image.voxelManager.getScalarData();
        const places = [], value = [];
        for (let n = 0; n < values.length; n++) if (values[n]) { places.push(n); value.push(values[n]); }
        const plane = metaData.get('imagePlaneModule', image.referencedImageId);
        return {position: Array.from(plane.imagePositionPatient), set: places, value};
    });
    const segments = Object.values(found.segments).filter(s => s && s.segmentIndex);
    return {slices, names: Object.fromEntries(segments.map(s => [s.segmentIndex, s.label]))};
}"""


class OhifPage:
    """One tab on one study; `requests` and `errors` are what it asked of the server and what went wrong."""

    def __init__(self, page: Page, server: str) -> None:
        self.page, self.server = page, server
        self.requests: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.console: deque[str] = deque(maxlen=30)
        self._model = ""
        page.set_default_timeout(SECONDS * 1000)
        page.route("**/*", lambda route: route.continue_() if self._own(route.request) else route.abort())
        page.on("request", self._note_request)
        page.on("response", self._note_response)
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(f"script: {error}"))

    def open(self, study: str) -> None:
        """The study in the MONAI Label mode, its images shown."""
        self._model = ""
        self.page.goto(f"{self.server}/ohif/monai-label?StudyInstanceUIDs={study}", wait_until="commit")
        self.page.wait_for_selector("#monailabelServerURL")
        self.page.wait_for_function(_LOADED, arg=VIEWPORTS)
        warning = self.page.get_by_text("Confirm and Hide")
        if warning.count():
            warning.first.click()

    def connect(self) -> list[str]:
        """Presses the panel's button; answers the models it then offers for clicks."""
        self.page.click(".settingsTable button.actionButton")
        self.page.locator("label.tab-label", has_text="Point Prompts").click()
        options = self.page.locator(".tab:has(input[value=pointprompts]) select.selectBox option")
        options.first.wait_for(state="attached")
        self.page.wait_for_function(_LABEL_MAP)
        self.page.wait_for_timeout(SETTLE_MS)
        return [str(name) for name in options.evaluate_all("found => found.map(o => o.value)")]

    def choose(self, model: str, label: str) -> None:
        """A model, and a label of the table."""
        tab = self.page.locator(".tab:has(input[value=pointprompts])")
        if self._model != model:
            tab.locator("select.selectBox").select_option(model)
            self._model = model
        tab.locator("tr.clickable-row", has_text=label).click()

    def look_at(self, world: Sequence[float]) -> None:
        """The axial view scrolled, moved and enlarged to a point (LPS, mm);
        soft tissue's window in all views."""
        self.page.evaluate(_GO_TO, [list(map(float, world)), MILLIMETRES])
        self.page.wait_for_timeout(SETTLE_MS)

    def click(self, world: Sequence[float]) -> None:
        """A point in the slice looked at; LPS millimetres."""
        before = len(self.points())
        x, y = self.page.evaluate(_ON_SCREEN, list(map(float, world)))
        self.page.mouse.move(x, y)
        self.page.mouse.click(x, y, delay=50)
        self.page.wait_for_function(f"n => ({_POINTS})().length > n", arg=before)

    def points(self) -> list[list[float]]:
        """[N][3] the points placed for the label chosen; LPS millimetres."""
        found: list[list[float]] = self.page.evaluate(_POINTS)
        return found

    def run(self) -> dict[str, Any]:
        """Presses Run and waits until the mask has come and is drawn; answers the request as it was sent."""
        # The panel's own words; its notice on the screen goes after four seconds, seen or not.
        with self.page.expect_console_message(lambda m: _UPDATED in m.text, timeout=SECONDS * 1000):
            self.page.locator(".tab:has(input[value=pointprompts]) button.actionButton").click()
        self.page.wait_for_timeout(SETTLE_MS)
        return self.requests[-1]

    def mask(self) -> dict[str, Any]:
        """The page's own label map: dimensions (I, J, K), places and values other than 0, segments' names."""
        found: dict[str, Any] = self.page.evaluate(_MASK)
        return found

    def archived(self) -> dict[str, Any]:
        """The study's segmentation in the archive: values other than 0 by slice, and segments' names."""
        found: dict[str, Any] = self.page.evaluate(_ARCHIVED)
        return found

    def world(self, index: Sequence[int]) -> list[float]:
        """Where the page puts a voxel of its label map; LPS millimetres."""
        return [float(x) for x in self.page.evaluate(_WORLD, list(index))]

    def picture(self, path: Path) -> None:
        """A screenshot."""
        self.page.screenshot(path=path)

    def _own(self, request: Request) -> bool:
        return request.url.startswith((self.server, "data:", "blob:"))

    def _note_request(self, request: Request) -> None:
        if "/infer/" in request.url:
            parts = urlsplit(request.url)
            self.requests.append(
                {
                    "method": request.method,
                    "path": parts.path,
                    "query": {key: value[0] for key, value in parse_qs(parts.query).items()},
                    "params": _form_field(request.post_data or "", "params"),
                }
            )

    def _note_response(self, response: Response) -> None:
        if response.status >= 400 and self._own(response.request):
            self.errors.append(f"{response.status} {response.request.method} {response.url}")


def _form_field(body: str, name: str) -> dict[str, Any]:
    """A JSON field of a multipart form."""
    _, _, rest = body.partition(f'name="{name}"')
    found: dict[str, Any] = json.loads(rest.split("\r\n\r\n", 1)[1].split("\r\n--", 1)[0])
    return found


@contextmanager
def ohif(server: str, pictures: Path) -> Iterator[OhifPage]:
    """A browser with one empty tab, told where the server is; where it fails, a picture is left."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        try:
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            context.add_cookies([{"name": "MONAILABEL_SERVER_URL", "value": server, "url": server}])
            page = OhifPage(context.new_page(), server)
            try:
                yield page
            except Exception:
                page.picture(pictures / "failed.png")
                print("what went wrong in the page:", page.errors, page.console, file=sys.stderr)
                raise
        finally:
            browser.close()
