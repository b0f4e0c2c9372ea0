package config

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// MaxSize is the most a config may weigh. A YAML parser makes up to a hundred
// bytes of memory of each byte, and the agent lives under a limit of 64 MiB; a
// config with every key is below 8 KiB.
const MaxSize = 256 << 10

// maxChecked bounds the work of checking each override on top of the rest, in
// values; a thousand nodes with an override each are below a quarter million.
const maxChecked = 2_000_000

// Config is a file that was read and found good. The zero value is the config
// of an agent that was given none. It is safe for concurrent use.
type Config struct {
	// Name of the file, as in messages; empty for the defaults.
	Name string
	// Sum identifies the content; empty for the defaults.
	Sum string

	base      *node // without overrides
	overrides []selected
}

type selected struct {
	labels map[string]string
	tree   *node // without nodeSelector
}

// Load reads and parses a file. A file that is not there is an error that wraps
// fs.ErrNotExist; one that holds mistakes is [Problems].
func Load(file string) (*Config, error) {
	data, err := read(file)
	if err != nil {
		return nil, err
	}
	return Parse(file, data)
}

// read reads one byte more than is allowed at most, for Parse to object to.
func read(file string) ([]byte, error) {
	// Non-blocking, or a FIFO nobody writes to would hold the daemon for ever.
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read the config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the config: %w", err)
	}
	return data, nil
}

// Parse checks everything: the syntax, each key and value, each override laid
// over the rest. The error is [Problems], each with the given file name. A
// ConfigMap that holds the config under the key config.yaml is taken too, so
// that the manifest a user keeps can be checked as it is.
func Parse(name string, data []byte) (*Config, error) {
	d := decoder{}
	c := d.parse(data)
	if err := d.err(name); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(data)
	c.Name, c.Sum = name, hex.EncodeToString(sum[:])
	return c, nil
}

func (d *decoder) parse(data []byte) *Config {
	doc := d.document(data)
	if doc == nil {
		return nil
	}
	b := builder{open: map[*yaml.Node]bool{}}
	root := b.build(doc, nil, "", -1, 0)
	d.problems = b.problems
	if root == nil || b.tooMany {
		return nil
	}
	if root.kind != yaml.MappingNode {
		d.bad(root.line, "", "want a mapping that starts with apiVersion: %s and kind: %s, not %s", APIVersion, Kind, root.what())
		return nil
	}
	if !d.header(root) {
		return nil
	}
	all := document{AgentConfig: *Default()}
	d.decode(root, reflect.ValueOf(&all).Elem())

	c := &Config{base: root.without("overrides")}
	d.validate(&all.AgentConfig, c.base, "")
	list := root.get("overrides")
	if list == nil {
		return c
	}
	if n := c.base.count() * len(list.items); n > maxChecked {
		d.bad(list.line, "overrides", "too much to check: %d overrides, each on top of %d values", len(list.items), c.base.count())
		return nil
	}
	for i, item := range list.items {
		if item.kind != yaml.MappingNode {
			continue
		}
		labels := all.Overrides[i].NodeSelector
		d.selector(labels, item)
		o := selected{labels, item.without("nodeSelector")}
		c.overrides = append(c.overrides, o)
		// Alone on top of the rest, so that a mistake is told to whoever wrote
		// it and not first on the node it selects.
		if d.full() {
			continue
		}
		effective, tree := c.with(o)
		d.validate(effective, tree, item.path())
	}
	return c
}

// header checks what kind of document it is; with another kind nothing below
// would mean anything.
func (d *decoder) header(root *node) bool {
	ok := true
	for _, h := range []struct{ key, want string }{{"apiVersion", APIVersion}, {"kind", Kind}} {
		n := root.get(h.key)
		switch {
		case n == nil || n.null():
			d.bad(0, h.key, "is missing: want %s", h.want)
		case n.kind != yaml.ScalarNode || n.value != h.want:
			d.bad(n.line, h.key, "want %s, not %s", h.want, n.what())
			ok = false
		}
	}
	return ok
}

// with decodes the base with overrides laid over it, which Parse has found to
// fit the types already.
func (c *Config) with(overrides ...selected) (*AgentConfig, *node) {
	tree := c.base
	for _, o := range overrides {
		tree = merge(tree, o.tree)
	}
	effective := Default()
	if tree != nil {
		d := decoder{}
		d.decode(tree, reflect.ValueOf(effective).Elem())
	}
	return effective, tree
}

// ForNode returns what is in force on a node with these labels: the file's own
// settings, then each override whose nodeSelector the labels satisfy, later ones
// winning key by key; lists are replaced whole. Require is then joined by what
// the storage profiles require. Without labels no override
// applies. The error is [Problems]: overrides that are each good may contradict
// one another.
func (c *Config) ForNode(labels map[string]string) (AgentConfig, error) {
	var match []selected
	for _, o := range c.overrides {
		if o.matches(labels) {
			match = append(match, o)
		}
	}
	effective, tree := c.with(match...)
	if len(match) > 1 {
		d := decoder{}
		d.validate(effective, tree, "the overrides of this node")
		if err := d.err(c.Name); err != nil {
			return *effective, err
		}
	}
	effective.Require, _ = effective.requirements()
	return *effective, nil
}

// Overrides returns how many overrides the file has: without any, a node's
// labels need not be known.
func (c *Config) Overrides() int { return len(c.overrides) }

func (s selected) matches(labels map[string]string) bool {
	for k, v := range s.labels {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return len(s.labels) > 0
}

// document parses the YAML and returns its one document, out of a ConfigMap
// where it stands in one.
func (d *decoder) document(data []byte) *yaml.Node {
	if !d.isText(data) {
		return nil
	}
	top := d.yaml(data)
	if top == nil {
		return nil
	}
	kind, _ := child(top, "kind")
	if kind == nil || kind.Value != "ConfigMap" {
		return top
	}
	entries, _ := child(top, "data")
	inner, _ := child(entries, "config.yaml")
	if inner == nil || inner.Kind != yaml.ScalarNode {
		d.bad(kind.Line, "data", "this ConfigMap has no key config.yaml")
		return nil
	}
	if inner.Style != yaml.LiteralStyle {
		d.bad(inner.Line, `data["config.yaml"]`, "want the config as a block that starts with |")
		return nil
	}
	text := d.yaml([]byte(inner.Value))
	shift(text, inner.Line)
	for i := range d.list {
		if d.list[i].Line > 0 {
			d.list[i].Line += inner.Line
		}
	}
	return text
}

// child returns the value of a key, and its key.
func child(n *yaml.Node, key string) (value, at *yaml.Node) {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1], n.Content[i]
		}
	}
	return nil, nil
}

// shift moves the lines of an inner document to where they stand in the outer.
func shift(n *yaml.Node, lines int) {
	if n == nil {
		return
	}
	n.Line += lines
	for _, c := range n.Content {
		shift(c, lines)
	}
}

// isText refuses what no YAML parser should be given.
func (d *decoder) isText(data []byte) bool {
	switch {
	case len(data) > MaxSize:
		d.bad(0, "", "more than %d KiB, which no config needs", MaxSize>>10)
	case bytes.HasPrefix(data, []byte("\xff\xfe")) || bytes.HasPrefix(data, []byte("\xfe\xff")):
		d.bad(1, "", "the file is UTF-16: save it as UTF-8")
	case !utf8.Valid(data):
		i := 0
		for r, size := utf8.DecodeRune(data[i:]); r != utf8.RuneError || size != 1; r, size = utf8.DecodeRune(data[i:]) {
			i += size
		}
		d.bad(lineOf(data, i), "", "not a text file: byte 0x%02x is not UTF-8", data[i])
	default:
		i := bytes.IndexFunc(data, func(r rune) bool { return r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0x7f })
		if i < 0 {
			return true
		}
		d.bad(lineOf(data, i), "", "not a text file: it holds the control character 0x%02x", data[i])
	}
	return false
}

func lineOf(data []byte, offset int) int { return 1 + bytes.Count(data[:offset], []byte("\n")) }

func (d *decoder) yaml(data []byte) *yaml.Node {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	err := dec.Decode(&doc)
	switch {
	case errors.Is(err, io.EOF) || err == nil && len(doc.Content) == 1 && doc.Content[0].ShortTag() == "!!null":
		d.bad(0, "", "the file says nothing: want at least apiVersion: %s and kind: %s", APIVersion, Kind)
		return nil
	case err != nil:
		d.syntax(data, err)
		return nil
	}
	switch err := dec.Decode(&second); {
	case errors.Is(err, io.EOF):
		return doc.Content[0]
	case err != nil:
		d.syntax(data, err)
	default:
		d.bad(max(second.Line, 1), "", "a second document starts here: a config is one document")
	}
	return nil
}

var (
	yamlLine   = regexp.MustCompile(`^line (\d+): `)
	yamlAnchor = regexp.MustCompile(`^unknown anchor '([^']+)'`)
)

// syntax gives an error of the YAML parser its line in our form.
func (d *decoder) syntax(data []byte, err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 0
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1])
		text = text[len(m[0]):]
	} else if m := yamlAnchor.FindStringSubmatch(text); m != nil {
		if i := bytes.Index(data, []byte("*"+m[1])); i >= 0 {
			line = lineOf(data, i)
		}
	}
	// Mistakes of the grammar carry lines counted from 0, those of the scanner
	// from 1 (go.yaml.in/yaml/v3 yaml.go, parser.fail).
	if strings.HasPrefix(text, "did not find expected") {
		line++
	}
	// A tab is what people run into most and what the parser words worst, on
	// its line or on the one after.
	lines := bytes.Split(data, []byte("\n"))
	for i := max(line-2, 0); i < min(line+1, len(lines)); i++ {
		indent := lines[i][:len(lines[i])-len(bytes.TrimLeft(lines[i], " \t"))]
		if bytes.ContainsRune(indent, '\t') {
			d.bad(i+1, "", "a tab in the indentation: YAML wants spaces")
			return
		}
	}
	if plain, ok := plainly[text]; ok {
		text = plain
	}
	d.bad(line, "", "not YAML: %s", text)
}

// plainly says what the YAML parser means.
var plainly = map[string]string{
	"did not find expected ',' or '}'":               "the { here is never closed, or a comma is missing after it",
	"did not find expected ',' or ']'":               "the [ here is never closed, or a comma is missing after it",
	"did not find expected key":                      "the mapping that stands here is broken: look at indentation and quotes on this line and below",
	"did not find expected '-' indicator":            "the list that stands here is broken: look at indentation on this line and below",
	"did not find expected node content":             "a value is missing",
	"mapping values are not allowed in this context": "a colon where no key can stand: look at the indentation, or quote the value",
	"could not find expected ':'":                    "a key without its colon",
	"found character that cannot start any token":    "a value can not start like this: quote it",
	"found unexpected end of stream":                 "a quote is never closed",
}

// YAML is the config in the form of the file, with the defaults filled in.
func (c AgentConfig) YAML() ([]byte, error) {
	data, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode the config: %w", err)
	}
	// JSON is YAML: parsed again it keeps the order of the struct's fields,
	// and loses the quotes and braces where YAML needs none.
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("encode the config: %w", err)
	}
	plain(&doc)
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := errors.Join(enc.Encode(&doc), enc.Close()); err != nil {
		return nil, fmt.Errorf("encode the config: %w", err)
	}
	return b.Bytes(), nil
}

// oldWord is what YAML 1.1, which many tools still read, takes for a boolean or
// a number to the base of 60.
var oldWord = regexp.MustCompile(`^(?i:y|n|yes|no|on|off|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+)$`)

func plain(n *yaml.Node) {
	n.Style = 0
	switch {
	case n.Kind != yaml.ScalarNode:
	case strings.Contains(n.Value, "\n"):
		n.Style = yaml.LiteralStyle
	case n.ShortTag() == "!!str" && oldWord.MatchString(n.Value):
		n.Style = yaml.DoubleQuotedStyle
	}
	for _, c := range n.Content {
		plain(c)
	}
}
