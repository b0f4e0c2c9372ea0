package probes

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// aptConfig is what apt is configured to, by the full name of a setting in lower
// case, for names do not depend on it: "apt::periodic::enable".
type aptConfig map[string]string

// readAptConfig reads apt's files in their order (apt.conf(5)): those of
// apt.conf.d by name, then apt.conf. A file with an error ends there, as far as
// this reader goes; apt itself refuses to work then.
func readAptConfig(ctx context.Context, v host.View) (aptConfig, error) {
	config := aptConfig{}
	names, err := ls(ctx, v, aptParts, "")
	if err != nil {
		return nil, err
	}
	for _, name := range append(names, "/etc/apt/apt.conf") {
		if strings.HasPrefix(name, aptParts+"/") && !isAptPart(path.Base(name)) {
			continue
		}
		data, err := v.ReadFileMax(ctx, name, 1<<20)
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, host.ErrNotRegular):
			continue
		case err != nil:
			return nil, err
		}
		parseAptConf(data, config)
	}
	return config, nil
}

const aptParts = "/etc/apt/apt.conf.d"

// isAptPart follows GetListOfFilesInDir of apt: no extension or "conf", and
// nothing but letters, digits, '-', '_' and '.' in the name.
func isAptPart(name string) bool {
	if ext := path.Ext(name); ext != "" && ext != ".conf" {
		return false
	}
	return name[0] != '.' && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == ""
}

// on reports whether a switch is set to one of the words apt takes for true
// (StringToBool of apt-pkg).
func (c aptConfig) on(name string) bool {
	switch strings.ToLower(c[name]) {
	case "yes", "true", "with", "on", "enable":
		return true
	}
	n, err := strconv.Atoi(c[name])
	return err == nil && n != 0
}

// interval reads how often apt.systemd.daily does something: a number of days,
// or with a suffix s, m, h or d, or "always"; ok is false for never.
func (c aptConfig) interval(name string) (every time.Duration, ok bool) {
	text := c[name]
	if text == "always" {
		return 0, true
	}
	unit := 24 * time.Hour
	if text != "" {
		switch text[len(text)-1] {
		case 's':
			unit = time.Second
		case 'm':
			unit = time.Minute
		case 'h':
			unit = time.Hour
		}
		text = strings.TrimRight(text, "smhd")
	}
	n, err := strconv.Atoi(text)
	if err != nil || n <= 0 {
		return 0, false
	}
	return time.Duration(min(n, 10000)) * unit, true
}

// parseAptConf lays a file over what was read before. Lists are left out: an
// element without a name, "X:: value", is none of the settings looked at.
func parseAptConf(data []byte, config aptConfig) {
	var scopes []string
	full := func(name string) string {
		parts := scopes
		if name != "" {
			parts = append(parts[:len(parts):len(parts)], name)
		}
		return strings.ToLower(strings.Join(parts, "::"))
	}
	var words []string // of the statement that is being read
	end := func() {
		defer func() { words = nil }()
		switch {
		case len(words) == 0:
		case strings.EqualFold(words[0], "#clear"):
			// apt refuses a file that has it within a scope.
			for _, name := range words[1:] {
				gone := strings.ToLower(name)
				maps.DeleteFunc(config, func(key, _ string) bool {
					return key == gone || strings.HasPrefix(key, gone+"::")
				})
			}
		case words[0][0] == '#': // #include and #x-apt-configure-index
		case len(words) >= 2 && !strings.HasSuffix(words[0], "::"):
			config[full(words[0])] = words[1]
		}
	}
	for word, quoted := range aptWords(data) {
		switch {
		case quoted:
			if len(words) == 0 {
				word = "::" // an element of a list
			}
			words = append(words, word)
		case word == "{":
			name := ""
			if len(words) > 0 {
				name = words[0]
			}
			// As deep as no file is: a hostile one must not grow memory.
			if len(scopes) >= 100 {
				return
			}
			scopes, words = append(scopes, name), nil
		case word == "}":
			end()
			if len(scopes) > 0 {
				scopes = scopes[:len(scopes)-1]
			}
		case word == ";":
			end()
		default:
			words = append(words, word)
		}
	}
	end()
}

// aptWords splits a file into names, values and the three signs, without its
// comments. "//" begins a comment only where a word may begin, so that it may
// stand in one; a line that begins with '#' is one but for the two commands.
func aptWords(data []byte) func(yield func(word string, quoted bool) bool) {
	return func(yield func(string, bool) bool) {
		text := string(data)
		for text != "" {
			switch c := text[0]; {
			case c <= ' ':
				text = text[1:]
			case c == '{' || c == '}' || c == ';':
				if !yield(text[:1], false) {
					return
				}
				text = text[1:]
			case c == '"':
				value, rest, _ := strings.Cut(text[1:], `"`)
				// A value is on one line; what is not closed there is an error.
				if line, after, broken := strings.Cut(value, "\n"); broken {
					value, rest = line, after+`"`+rest
				}
				if !yield(value, true) {
					return
				}
				text = rest
			case strings.HasPrefix(text, "/*"):
				_, text, _ = strings.Cut(text[2:], "*/")
			case strings.HasPrefix(text, "//"):
				_, text, _ = strings.Cut(text, "\n")
			case c == '#' && !isAptCommand(text):
				_, text, _ = strings.Cut(text, "\n")
			default:
				i := strings.IndexFunc(text, func(r rune) bool { return r <= ' ' || strings.ContainsRune(`{};"`, r) })
				if i < 0 {
					i = len(text)
				}
				if !yield(text[:i], false) {
					return
				}
				text = text[i:]
			}
		}
	}
}

func isAptCommand(text string) bool {
	for _, command := range []string{"#clear", "#include"} {
		if len(text) > len(command) && strings.EqualFold(text[:len(command)], command) && text[len(command)] <= ' ' {
			return true
		}
	}
	return false
}
