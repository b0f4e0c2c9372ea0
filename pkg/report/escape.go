package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"
)

// What the agent prints may hold anything a process or a file was named by
// somebody else. Tables and messages pass through oneLine, which changes what a
// terminal would obey; documents must keep it, and say it with the escapes of
// their format. JSON and YAML leave U+009B, which begins an escape sequence,
// and the marks that turn the direction of text as they are.

// WriteJSON writes v as one indented JSON document without a character that a
// terminal would obey, or not show.
func WriteJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(Escape(w))
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// WriteYAML is WriteJSON for YAML.
func WriteYAML(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	out, err := yaml.JSONToYAML(data)
	if err != nil || bytes.IndexFunc(data, invisible) >= 0 || bytes.IndexFunc(out, invisible) >= 0 {
		if out, err = escapedYAML(data); err != nil {
			return err
		}
	}
	_, err = w.Write(out)
	return err
}

// Escape returns a writer of JSON documents or lines of a log, each in one call
// of Write. Outside of its strings JSON has no character that is escaped;
// slog's lines of text leave U+007F as it is.
func Escape(w io.Writer) io.Writer { return escaper{w} }

type escaper struct{ w io.Writer }

func (e escaper) Write(p []byte) (int, error) {
	if bytes.IndexFunc(p, invisible) < 0 {
		return e.w.Write(p)
	}
	escaped := escape(p, func(b *bytes.Buffer, r rune) {
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(b, `\u%04x`, unit)
		}
	})
	if _, err := e.w.Write(escaped); err != nil {
		return 0, err
	}
	return len(p), nil
}

// escapedYAML puts what needs escapes into double quotes, the one style that has
// them. JSONToYAML reads JSON as YAML, in which U+009B is an error and U+0085 the
// end of a line.
func escapedYAML(data []byte) ([]byte, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var plain any
	if err := dec.Decode(&plain); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	enc := yamlv3.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(yamlNode(plain)); err != nil {
		return nil, err
	}
	return escape(b.Bytes(), func(b *bytes.Buffer, r rune) { fmt.Fprintf(b, `\U%08x`, r) }), nil
}

// yamlNode represents a value of encoding/json.
func yamlNode(v any) *yamlv3.Node {
	n := &yamlv3.Node{Kind: yamlv3.ScalarNode}
	switch v := v.(type) {
	case map[string]any:
		n.Kind = yamlv3.MappingNode
		for _, key := range slices.Sorted(maps.Keys(v)) {
			n.Content = append(n.Content, yamlNode(key), yamlNode(v[key]))
		}
	case []any:
		n.Kind = yamlv3.SequenceNode
		for _, item := range v {
			n.Content = append(n.Content, yamlNode(item))
		}
	case string:
		n.Tag, n.Value = "!!str", v
		if strings.IndexFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			n.Style = yamlv3.DoubleQuotedStyle
		}
	case nil:
		n.Tag, n.Value = "!!null", "null"
	default: // a number or a truth value
		n.Value = fmt.Sprint(v)
	}
	return n
}

// invisible is what is escaped: all but the lines of a document themselves.
func invisible(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }

func escape(data []byte, as func(*bytes.Buffer, rune)) []byte {
	var b bytes.Buffer
	for len(data) > 0 {
		r, n := utf8.DecodeRune(data)
		if invisible(r) {
			as(&b, r)
		} else {
			b.Write(data[:n])
		}
		data = data[n:]
	}
	return b.Bytes()
}

// Lines makes text of several lines, such as an error, fit for a terminal.
func Lines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = oneLine(lines[i])
	}
	return strings.Join(lines, "\n")
}
