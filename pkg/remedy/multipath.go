package remedy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// multipathSections are the sections of multipath.conf(5).
var multipathSections = []string{"defaults", "blacklist", "blacklist_exceptions", "devices", "multipaths", "overrides", "protocol", "device", "multipath"}

// checkMultipathSyntax finds what would make multipathd drop part of a snippet:
// it skips what it does not understand and goes on with its defaults, which is
// how a missing brace turns a blacklist into none. It is checked before the
// file is written, also on hosts that do not have multipath yet.
func checkMultipathSyntax(conf []byte) error {
	var open []string
	n := 0
	for raw := range bytes.Lines(conf) {
		n++
		words, err := multipathWords(string(raw))
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		for len(words) > 0 {
			switch {
			case words[0] == "}":
				if len(open) == 0 {
					return fmt.Errorf("line %d: a '}' closes nothing", n)
				}
				open, words = open[:len(open)-1], words[1:]
			case len(words) > 1 && words[1] == "{":
				if !slices.Contains(multipathSections, words[0]) {
					return fmt.Errorf("line %d: there is no section %q", n, words[0])
				}
				open, words = append(open, words[0]), words[2:]
			case len(open) == 0:
				return fmt.Errorf("line %d: %q stands outside of a section", n, words[0])
			case len(words) < 2 || words[1] == "}":
				return fmt.Errorf("line %d: %q has no value", n, words[0])
			default:
				// multipathd takes one keyword and its value a line.
				end := 2
				if len(words) > end && words[end] != "}" {
					return fmt.Errorf("line %d: more than one value for %q: put it in quotes", n, words[0])
				}
				words = words[end:]
			}
		}
	}
	if len(open) > 0 {
		return fmt.Errorf("the section %s is not closed", open[len(open)-1])
	}
	return nil
}

// multipathWords splits a line; '#' and '!' begin a comment, quotes hold a value
// together (libmultipath's alloc_strvec).
func multipathWords(line string) ([]string, error) {
	var words []string
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimLeft(line, " \t\r\n") {
		switch line[0] {
		case '#', '!':
			return words, nil
		case '{', '}':
			words, line = append(words, line[:1]), line[1:]
		case '"':
			end := 1
			for end < len(line) && line[end] != '"' {
				end++
			}
			if end == len(line) {
				return nil, fmt.Errorf("a quote is not closed")
			}
			words, line = append(words, line[:end+1]), line[end+1:]
		default:
			end := strings.IndexAny(line, " \t\r\n{}\"#!")
			if end < 0 {
				end = len(line)
			}
			words, line = append(words, line[:end]), line[end:]
		}
	}
	return words, nil
}

// multipathComplaints are the lines of `multipath -t` on standard error that
// speak of a file: "/etc/multipath/conf.d/x.conf line 3, invalid keyword: foo".
func multipathComplaints(stderr []byte, file string) []string {
	var lines []string
	for raw := range bytes.Lines(stderr) {
		line := strings.TrimSpace(string(raw))
		if strings.Contains(line, file) || strings.Contains(line, file[strings.LastIndexByte(file, '/')+1:]) {
			lines = append(lines, line)
		}
	}
	return lines
}
