#include "view/comparison_page.h"

#include <fmt/format.h>

#include "view/picture.h"

namespace tessera {

namespace {

constexpr std::string_view kStyle = R"css(
:root { --text: #1b1f24; --soft: #57606a; --line: #d8dee4; --page: #ffffff; --marker: #d95f02; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 48rem; margin: .4rem 0; color: var(--soft); }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { font-family: "DejaVu Sans Mono", monospace; font-size: .9rem; }
td.found::before { content: "\2713\00a0"; } td.lost::before { content: "\2717\00a0"; }
td.lost { color: var(--marker); }
.scroll { overflow-x: auto; }
.maps { display: grid; gap: 1.1rem; align-items: end; margin: .6rem 0 1.6rem; }
figure { margin: 0; }
.map { position: relative; border: 1px solid var(--line); aspect-ratio: 1; overflow: hidden; }
.map img { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.map i { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px dashed var(--marker); }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .25rem; line-height: 1.3; }
figcaption b { color: var(--text); font-weight: 600; }
h3 { font: 600 .95rem "DejaVu Sans Mono", monospace; margin: 1.2rem 0 0; }
h3 span { font: .85rem system-ui, "Liberation Sans", sans-serif; color: var(--soft); margin-left: .6rem; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1.2rem; font-size: .85rem; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: .35rem; }
.legend b { width: 1.1rem; height: 1.1rem; display: inline-block; border: 1px solid var(--line); }
.legend i { height: 1.1rem; border-left: 2px dashed var(--marker); }
)css";

std::string escape(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::string seconds(double milliseconds) {
  return fmt::format("{:.2f} s", milliseconds / 1000);
}

std::string speed_up(double base, double value) {
  return value > 0 ? fmt::format("{:.2f} ×", base / value) : "";
}

std::string percent(double share) {
  return fmt::format("{:.{}f} %", share * 100, share < 0.0995 ? 1 : 0);
}

std::string table_of(const ComparisonPage& page) {
  std::string html =
      "<div class=scroll><table>\n<thead><tr><th>method<th>density<th>prefill<th>speed-up<th>attention<th>speed-up"
      "<th>bits per byte<th>pass key</tr></thead>\n<tbody>\n";
  for (const MethodResult& result : page.results) {
    const MethodResult& base = page.results.front();
    html += fmt::format("<tr><td title=\"{}\">{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td class={}>{}</tr>\n",
                        escape(result.parameters), escape(result.method), percent(result.density),
                        seconds(result.prefill_ms), speed_up(base.prefill_ms, result.prefill_ms),
                        seconds(result.attention_ms), speed_up(base.attention_ms, result.attention_ms),
                        result.bits_per_byte ? fmt::format("{:.3f}", *result.bits_per_byte) : "",
                        result.found ? "found" : "lost", escape(printable(result.answer)));
  }
  return html + "</tbody></table></div>\n";
}

std::string legend() {
  std::string html = "<div class=legend><span><b style=\"background:#fff\"></b>after the query (causal)</span>";
  html += fmt::format("<span><b style=\"background:{}\"></b>skipped</span>", colour_of_share(0));
  for (const double share : {0.01, 0.1, 0.5, 1.0}) {
    html += fmt::format("<span><b style=\"background:{}\"></b>{:.0f} % computed</span>", colour_of_share(share),
                        share * 100);
  }
  return html + "<span><i></i>where the pass key stands</span></div>\n";
}

std::string maps_of(const ComparisonPage& page, const MethodResult& result) {
  std::string html =
      fmt::format("<h3>{}<span>density {}</span></h3>\n", escape(result.method), percent(result.density));
  html +=
      fmt::format("<div class=maps style=\"grid-template-columns:repeat({},minmax(0,1fr))\">\n", result.maps.size());
  const double place = 100.0 * static_cast<double>(page.key_position) / static_cast<double>(page.tokens);
  for (const HeadMap& head : result.maps) {
    const std::string title = fmt::format("layer {}, head {}", head.layer, head.q_head);
    html += fmt::format(
        "<figure><div class=map><img alt=\"Pairs that {} computes in {}\" src=\"{}\"><i "
        "style=\"left:{:.2f}%\"></i></div>"
        "<figcaption>{} · <b>{}</b></figcaption></figure>\n",
        escape(result.method), title, data_uri("image/png", png_of(head.map)), place, title,
        percent(head.map.density()));
  }
  return html + "</div>\n";
}

}  // namespace

std::string printable(std::string_view text) {
  std::string clean;
  for (const char c : text) clean += c >= ' ' && c <= '~' ? c : '.';
  return clean;
}

std::string html_of(const ComparisonPage& page) {
  std::string html = fmt::format(
      "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta name=viewport "
      "content=\"width=device-width\">\n<title>Tessera: {}, {} tokens</title>\n<style>{}</style>\n</head>\n<body>\n",
      escape(page.document), page.tokens, kStyle);
  html += "<h1>One document, one model, several ways to attend</h1>\n";
  html += fmt::format(
      "<p>{} ({} tokens) through {}, on {}. A pass key, {}, is planted {:.0f} % into the document; the last line asks "
      "for it.</p>\n",
      escape(page.document), page.tokens, escape(page.model), escape(page.machine), escape(page.key),
      100.0 * static_cast<double>(page.key_position) / static_cast<double>(page.tokens));
  html += "<h2>Cost and quality</h2>\n";
  html += table_of(page);
  html += fmt::format(
      "<p>Everything was measured in the run that wrote this page. Density is the share of the causal query–key pairs "
      "that was computed, over all layers and heads. Attention is the time to choose the pairs and to compute them; "
      "prefill also holds the projections and, for the bits per byte, the output head. Speed-ups are against {}.</p>\n",
      page.results.empty() ? "dense" : escape(page.results.front().method));
  html += "<h2>What the heads computed</h2>\n";
  html +=
      "<p>Queries run from top to bottom, keys from left to right. A darker cell is one of which more was computed; "
      "the "
      "percentage is the density of that head.</p>\n";
  html += legend();
  for (const MethodResult& result : page.results) {
    if (!result.maps.empty()) html += maps_of(page, result);
  }
  return html + "</body>\n</html>\n";
}

}  // namespace tessera
