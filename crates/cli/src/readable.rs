//! Text of people and of other sites, made fit for a terminal.
//!
//! Whatever a post holds, it must not move the cursor, change colours or reorder what stands around it: control
//! characters and those that set a writing direction are taken out *after* HTML has been read, because `&#27;`
//! is an escape character too.

use std::ops::RangeInclusive;

use html2text::config;
use html2text::render::TrivialDecorator;
use html2text::{Element, Handle, RcDom};

/// HTML with more tags than this is shown as it is: crossed tags make elements by the square of their number,
/// and a few ten thousand would take all memory. Long posts of real forums have some hundreds.
const TAGS_MAX: usize = 4_000;

/// The first number of a list is believed up to here: the layout adds to it unchecked.
const START_MAX: u32 = 1_000_000;

/// How far code stands from the margin, and how wide a tab is in plain text.
const INDENT: &str = "    ";

/// Each line of code goes through the layout as one character of this private range, so that it is not wrapped.
const STAND_INS: RangeInclusive<char> = '\u{F0000}'..='\u{FFFFD}';

/// The elements that leave the lines of a `<pre>` as they are.
const INLINE: [&str; 13] = ["a", "b", "br", "code", "em", "i", "kbd", "samp", "span", "strong", "sub", "sup", "var"];

/// HTML as text of `width` columns: links as footnotes, code indented and never wrapped, no colours.
pub(crate) fn html(text: &str, width: usize) -> String {
    let laid_out = if text.matches('<').count() > TAGS_MAX { None } else { laid_out(text, width) };
    laid_out.map_or_else(|| plain(text, width), |text| tidy(&text))
}

/// Plain text wrapped to `width` columns; its line breaks and indentation stay.
pub(crate) fn plain(text: &str, width: usize) -> String {
    let lines: Vec<String> = without_controls(&text.replace('\t', INDENT)).split('\n').map(as_html).collect();
    let config = config::with_decorator(TrivialDecorator::new()).allow_width_overflow();
    let wrapped = config.string_from_read(lines.join("<br>").as_bytes(), width.max(1));
    tidy(&wrapped.unwrap_or_else(|_| text.to_owned()))
}

/// The text as one line, for tables and titles.
pub(crate) fn line(text: &str) -> String {
    without_controls(text).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The text without what drives a terminal. Line breaks of every kind become `\n`, tabs blanks.
fn without_controls(text: &str) -> String {
    let plain = |c: char| match c {
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{85}' | '\u{2028}' | '\u{2029}' => Some('\n'),
        '\t' => Some(' '),
        '\u{61C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => None,
        c => (!c.is_control()).then_some(c),
    };
    text.replace("\r\n", "\n").chars().filter_map(plain).collect()
}

/// No controls, no blanks at the end of a line, no empty lines around the whole.
fn tidy(text: &str) -> String {
    let text = without_controls(text).replace('\u{A0}', " ");
    let lines: Vec<&str> = text.split('\n').map(str::trim_end).collect();
    lines.join("\n").trim_matches('\n').to_owned()
}

/// One line of plain text as HTML that keeps its blanks.
fn as_html(line: &str) -> String {
    let mut html = String::with_capacity(line.len());
    let mut after_blank = true;
    for c in line.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            ' ' if after_blank => html.push('\u{A0}'),
            c => html.push(c),
        }
        after_blank = c == ' ';
    }
    html
}

/// HTML as text; `None` where the layout gives up.
fn laid_out(text: &str, width: usize) -> Option<String> {
    let config = config::plain().no_link_wrapping().allow_width_overflow();
    let dom = config.parse_html(text.as_bytes()).ok()?;
    let code = prepare(&dom)?;
    let tree = config.dom_to_render_tree(&dom).ok()?;
    let rendered = config.render_to_string(tree, width.max(1)).ok()?;
    Some(with_code(&rendered, code))
}

/// Takes out of the document what the layout does badly, among it the lines of code, which are returned.
fn prepare(dom: &RcDom) -> Option<Vec<String>> {
    let mut code = Vec::new();
    let mut nodes = vec![dom.document.clone()];
    while let Some(node) = nodes.pop() {
        if let Element { name, attrs, .. } = &node.data {
            // The layout panics where cells span several rows and columns; a plain grid shows as much.
            attrs.borrow_mut().retain(|attribute| match &*attribute.name.local {
                "colspan" | "rowspan" => false,
                "start" => attribute.value.parse().is_ok_and(|number| (0..=START_MAX).contains(&number)),
                _ => true,
            });
            match &*name.local {
                "pre" => set_aside(&node, &mut code)?,
                // A bare address needs no footnote that repeats it.
                "a" if is_leaf(&node) => {
                    let text = lines_of(&node)?.concat();
                    attrs.borrow_mut().retain(|attribute| attribute.value.trim() != text.trim());
                }
                _ => {}
            }
        }
        unwrap_mixed(&node);
        nodes.extend(node.children.borrow().iter().cloned());
    }
    Some(code)
}

/// Puts in place of each `<pre>` with pages inside what it holds, since in such the layout can loop for ever.
fn unwrap_mixed(parent: &Handle) {
    let mut children = parent.children.borrow_mut();
    let mut index = 0;
    while let Some(child) = children.get(index).cloned() {
        if is_pre(&child) && !is_inline(&child) {
            children.splice(index..=index, child.children.take());
        } else {
            index += 1;
        }
    }
}

fn is_pre(node: &Handle) -> bool {
    matches!(&node.data, Element { name, .. } if &*name.local == "pre")
}

/// Moves the lines of a `<pre>` to `code` and leaves a character for each.
fn set_aside(pre: &Handle, code: &mut Vec<String>) -> Option<()> {
    let mut html = String::from("<pre>");
    for line in lines_of(pre)? {
        html.push(STAND_INS.clone().nth(code.len())?);
        html.push('\n');
        code.push(line);
    }
    let dom = config::plain().parse_html(html.as_bytes()).ok()?;
    let stand_ins = descendants(&dom.document).find(is_leaf)?.children.take();
    pre.children.replace(stand_ins);
    Some(())
}

/// The text of an element without markup, line by line.
fn lines_of(element: &Handle) -> Option<Vec<String>> {
    let mut html = Vec::new();
    element.serialize(&mut html).ok()?;
    let width = html.len() + 1;
    let config = config::with_decorator(TrivialDecorator::new()).allow_width_overflow();
    let text = config.string_from_read(html.as_slice(), width).ok()?;
    Some(text.trim_matches('\n').split('\n').map(str::to_owned).collect())
}

/// Puts each line of code where its character stands; only once, so that no text can multiply it.
fn with_code(text: &str, mut code: Vec<String>) -> String {
    let mut whole = String::with_capacity(text.len());
    for c in text.chars() {
        let index =
            u32::from(c).checked_sub(u32::from(*STAND_INS.start())).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| code.get_mut(index)) {
            Some(line) => {
                whole.push_str(INDENT);
                whole.push_str(&std::mem::take(line));
            }
            None => whole.push(c),
        }
    }
    whole
}

/// A node and all below it, without recursion: documents nest as deeply as their authors like.
fn descendants(node: &Handle) -> impl Iterator<Item = Handle> {
    let mut nodes = vec![node.clone()];
    std::iter::from_fn(move || {
        let node = nodes.pop()?;
        nodes.extend(node.children.borrow().iter().cloned());
        Some(node)
    })
}

/// Whether an element holds nothing that makes lines or pages of its own.
fn is_inline(element: &Handle) -> bool {
    descendants(element).skip(1).all(|node| match &node.data {
        Element { name, .. } => INLINE.contains(&&*name.local),
        _ => true,
    })
}

/// Whether an element holds one text and nothing else.
fn is_leaf(element: &Handle) -> bool {
    matches!(element.children.borrow().as_slice(), [only] if !matches!(only.data, Element { .. }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn html_reads_like_a_page() {
        let page = html(
            "<h2>Head</h2><p>I <em>know</em> that a <a href=\"https://a.example/x?y&amp;z\">Turing machine</a> can \
             <code>x = 1</code>.</p><blockquote><p>said</p></blockquote><ul><li>one<li>two</ul>\
             <p><a href=\"https://b.example\">https://b.example</a> <img src=\"c.png\" alt=\"a cat\">",
            30,
        );
        let expected = "\
## Head

I *know* that a [Turing
machine][1] can `x = 1`.

> said
* one
* two

https://b.example [a cat]

[1]: https://a.example/x?y&z";
        assert_eq!(page, expected);
    }

    #[test]
    fn code_keeps_its_lines_and_is_not_wrapped() {
        let page = html(
            "<p>so:</p><pre class=\"x\"><code>def f(x):\n    <b>return</b> x &lt; 1  # as long as it was written\n\n\ty\n\
             </code></pre><ul><li>two<pre>\n z</pre></ul>",
            20,
        );
        let expected = "\
so:

    def f(x):
        return x < 1  # as long as it was written

            y
* two

       z";
        assert_eq!(page, expected);
    }

    #[test]
    fn nothing_drives_the_terminal() {
        let evil = "a&#27;[31mb\u{1b}]0;t\u{7}&#x9b;2J\u{9b}c&#8238;d\u{202e}e&#7;\u{8}<pre>\u{1b}[1m&#27;[2J</pre>";
        for text in [html(evil, 40), plain(evil, 40), line(evil)] {
            assert!(is_harmless(&text), "{text:?}");
        }
        assert!(html(evil, 40).starts_with("a[31mb]0;t"), "{:?}", html(evil, 40));
    }

    #[test]
    fn plain_text_keeps_breaks_and_indentation() {
        assert_eq!(
            plain("one two three four\r\n\r\n    in <b> &amp;\n\tx  y\rz\n\n", 14),
            "one two three\nfour\n\n    in <b>\n&amp;\n    x  y\nz"
        );
        assert_eq!(plain("日本語日本語", 6), "日本語\n日本語");
        assert_eq!(plain("", 80), "");
    }

    #[test]
    fn one_line_is_one_line() {
        assert_eq!(line("  a\tb\r\n\u{1b}[0m c\u{85}\u{2028}d "), "a b [0m c d");
        assert_eq!(line("\n"), "");
    }

    #[test]
    fn what_overwhelms_a_layout_is_shown_as_it_is_or_without_the_numbers() {
        let crossed: String = (0..60_000).map(|_| "<b>").collect();
        assert!(html(&crossed, 80).starts_with("<b><b>"));
        for text in [
            "<table><tr><td colspan=18446744073709551615>a<td colspan=18446744073709551615>b</table>",
            "<table><tr><td rowspan=99999999999 colspan=0>a<td>b<tr><td>c</table>",
            "<ol start=9223372036854775807><li>a<li>b</ol>",
            "<ol start=-9223372036854775808><li>a<li>b</ol>",
        ] {
            assert!(html(text, 80).contains('b'), "{text}");
        }
    }

    #[test]
    fn a_pre_with_pages_inside_does_not_loop() {
        assert_eq!(html("<blockquote><pre><r>\tx<pre>y</pre></pre>", 2), "> x\n>\n>     y");
    }

    #[test]
    fn deep_nesting_is_laid_out() {
        for tag in ["<div>", "<blockquote>", "<b>", "<ul><li>", "<sup>"] {
            assert!(html(&(tag.repeat(TAGS_MAX / 2) + "x"), 80).ends_with(['x', 'ˣ', '*', '}']), "{tag}");
        }
    }

    fn is_harmless(text: &str) -> bool {
        text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains(['\u{202e}', '\u{2066}'])
    }

    /// Pages of odd markup.
    fn pages() -> impl Strategy<Value = String> {
        let tag = prop::sample::select(vec![
            "a href=x",
            "a href=y name=z",
            "b",
            "code",
            "pre",
            "p",
            "div",
            "table",
            "tr",
            "td",
            "td colspan=0",
            "td colspan=7",
            "td colspan=99999999999999999999",
            "td rowspan=9",
            "th rowspan=0",
            "ol start=99",
            "ol start=-9",
            "ul",
            "li",
            "dl",
            "dt",
            "dd",
            "h1",
            "h6",
            "hr",
            "br",
            "img src=x alt=y",
            "img alt",
            "sup",
            "sub",
            "s",
            "blockquote",
            "svg",
            "title",
            "math",
            "template",
            "script",
            "style",
            "select",
            "option",
            "textarea",
            "form",
            "input",
            "tbody",
            "caption",
            "colgroup",
            "wbr",
            "!-- x --",
            "!DOCTYPE html",
            "?x",
            "",
            "/",
            "details",
            "summary",
            "iframe",
            "frameset",
            "plaintext",
            "span",
        ]);
        let piece = prop_oneof![
            4 => tag.clone().prop_map(|tag| format!("<{tag}>")),
            3 => tag.prop_map(|tag| format!("</{}>", tag.split(' ').next().unwrap_or_default())),
            2 => "[a-z 日\u{300}\u{200d}\u{1b}\n\t]{0,12}",
            1 => any::<char>().prop_map(|c| format!("&#{};{c}", u32::from(c))),
            1 => Just("&nbsp;\u{F0000}&lt;&#27;".to_owned()),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(500), ..ProptestConfig::default() })]

        #[test]
        fn any_page_is_harmless_at_any_width(page in pages(), width in 0..100_usize) {
            prop_assert!(is_harmless(&html(&page, width)));
            prop_assert!(is_harmless(&plain(&page, width)));
        }

        #[test]
        fn any_text_is_harmless(text in any::<String>(), width in 0..100_usize) {
            prop_assert!(is_harmless(&html(&text, width)));
            prop_assert!(is_harmless(&plain(&text, width)));
            let line = line(&text);
            prop_assert!(is_harmless(&line) && !line.contains('\n'));
        }
    }
}
