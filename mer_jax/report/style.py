"""How the report looks: one style sheet for light, dark and paper, without any outside resource."""

# Colours are those of Okabe and Ito, which stay apart for all common kinds of colour blindness; dark pages
# take their lighter variants. Nothing is told by colour alone: leaky figures are also hollow, hatched or in
# words.
STYLE = """
:root{color-scheme:light dark;
--paper:light-dark(#fff,#15181c);--ink:light-dark(#1b1f24,#e7eaee);
--muted:light-dark(#57606c,#9ba6b3);--rule:light-dark(#d8dce2,#343a42);--faint:light-dark(#eceef1,#262b31);
--blue:light-dark(#0072b2,#56b4e9);--orange:light-dark(#c65100,#f0944d);--green:light-dark(#007a5a,#3cc79d);
--purple:light-dark(#9a4f86,#d99ac7);--grey:light-dark(#6a737d,#98a2ad);
--warn:light-dark(#fff3e8,#33241a)}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
main{max-width:1008px;margin:0 auto;padding:32px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:21px;line-height:1.3;margin:0 0 4px;letter-spacing:-.005em}
section{margin-top:52px;scroll-margin-top:16px}
p{margin:0 0 12px;max-width:74ch;text-wrap:pretty}
a{color:var(--blue)}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.note,figcaption{color:var(--muted);font-size:14px}
.eyebrow{color:var(--muted);font-size:14px;margin:0 0 4px}
.answer{font-size:20px;line-height:1.5;margin:14px 0 18px;max-width:62ch}
.answer b{color:var(--blue);white-space:nowrap}
.banner{border-left:4px solid var(--orange);background:var(--warn);padding:12px 16px;margin:0 0 24px;
border-radius:0 6px 6px 0;max-width:none}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:14px 20px;margin:20px 0 0;
padding:16px 0;border:solid var(--rule);border-width:1px 0}
.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:0;font-size:19px;font-variant-numeric:tabular-nums}
nav{margin-top:14px;font-size:14px;line-height:1.9}
nav a{margin-right:14px;text-decoration:none;white-space:nowrap}
nav a:hover{text-decoration:underline}
.first{margin-top:12px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:15px;width:100%}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top;
font-weight:400}
thead th{font-size:13px;color:var(--muted);vertical-align:bottom;line-height:1.35;
border-bottom-color:var(--muted)}
td,.interval{white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;min-width:130px}
tbody tr.group th{color:var(--muted);font-size:13px;padding-top:18px}
tr.key th,tr.key td{font-weight:650}
.leaky{color:var(--orange);
background:repeating-linear-gradient(135deg,transparent 0 5px,var(--warn) 5px 10px)}
thead .leaky{color:var(--orange)}
figure{margin:14px 0 0}
figure svg,figure img{display:block;width:100%;height:auto}
figure svg.half{max-width:560px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:36px 40px}
figcaption{margin-top:6px;max-width:74ch}
details{margin-top:14px}
summary{cursor:pointer;color:var(--blue);padding:4px 0}
.terms{margin:8px 0 0;font-size:14px;columns:2;column-gap:40px}
.terms div{break-inside:avoid}
.terms dd{margin:0 0 8px;color:var(--muted)}
.clips td,.clips th{padding:3px 8px;font-size:14px;vertical-align:middle}
.clips td.p{min-width:86px;background:linear-gradient(90deg,color-mix(in srgb,var(--blue) 26%,transparent)
calc(var(--p)*100%),transparent 0)}
.clips td.p.miss{background:linear-gradient(90deg,color-mix(in srgb,var(--orange) 30%,transparent)
calc(var(--p)*100%),transparent 0)}
.clips td.true{font-weight:700;box-shadow:inset 3px 0 var(--ink)}
.values{columns:2;column-gap:40px;margin:0;font-size:14px}
.values div{display:flex;justify-content:space-between;gap:16px;border-bottom:1px solid var(--faint);
break-inside:avoid;padding:2px 0}
.values dt{color:var(--muted);overflow-wrap:anywhere}
.values dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
svg text{font-family:inherit;font-size:13px;fill:var(--ink)}
svg .tick{fill:var(--muted);font-size:12px}
svg .name{fill:var(--muted);font-size:13px}
svg .strong{font-weight:650}
svg .value{font-variant-numeric:tabular-nums;font-weight:600}
svg .axis{stroke:var(--muted)}
svg .grid{stroke:var(--faint)}
svg .rule{stroke:var(--rule)}
svg .reference{stroke:var(--muted);stroke-dasharray:4 3;stroke-width:1.3}
svg .mark{stroke:var(--c);stroke-dasharray:2 3;stroke-width:1.5}
svg .whisker{stroke:var(--ink);stroke-width:1.6}
svg .line{fill:none;stroke:var(--c);stroke-width:2.2;stroke-linejoin:round}
svg .band{fill:var(--c);opacity:.16}
svg .dot{fill:var(--c);fill-opacity:.75}
svg .ring{fill:var(--paper);fill-opacity:.6;stroke:var(--c);stroke-width:1.5}
svg .bar{fill:var(--c);fill-opacity:.62}
svg .box{fill:var(--c);fill-opacity:.16}
svg .median{stroke:var(--ink);stroke-width:2.2}
svg .cell,svg .tip{fill:var(--c)}
svg .share{font-size:12px}
svg .ink{--c:var(--ink)}
.blue{--c:var(--blue)}.orange{--c:var(--orange)}.green{--c:var(--green)}.purple{--c:var(--purple)}
.grey{--c:var(--grey)}
svg .named{fill:var(--c);font-weight:600}
@media (max-width:640px){main{padding:20px 14px 48px}h1{font-size:25px}.answer{font-size:18px}
.values,.terms{columns:1}figure{overflow-x:auto}figure svg.full{min-width:680px}}
@media print{:root{color-scheme:light}body{font-size:10pt}main{max-width:none;padding:0}nav{display:none}
.answer{font-size:13pt}table{font-size:9pt}thead th{font-size:8pt}th,td{padding:3px 6px}.scroll{overflow:visible}
.pair{grid-template-columns:1fr 1fr;gap:24px}
section{margin-top:26px}figure,tr{break-inside:avoid}h2{break-after:avoid}
details::details-content{content-visibility:visible;block-size:auto}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
