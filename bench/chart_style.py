"""One look for every chart."""

INK, FAINT, MUTED = "#1d2433", "#667085", "#98a2b3"
SERIES = ("#2456c9", "#e08e2b", "#2f9e6e", "#b5478f", "#7a5cc4", "#c94f3d")
STYLE: dict = {
    "font.size": 9.5,
    "axes.edgecolor": "#c5cbd6",
    "axes.labelcolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
