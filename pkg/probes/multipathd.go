package probes

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// Where multipathd listens: always on the abstract name, which lives in the
// host's network namespace, and since 0.12.0 on a path too (multipathd(8)).
const (
	multipathdPath     = "/run/multipathd.socket"
	multipathdAbstract = "@/org/kernel/linux/storage/multipathd"
)

const (
	// multipathdPatience is a second longer than multipathd's own
	// uxsock_timeout (4 s), so that its word "timeout" still arrives when it
	// can not get the lock over its tables.
	multipathdPatience = 5 * time.Second
	// multipathdReplyMax is the limit multipathd's own client has (uxsock.h).
	multipathdReplyMax = 32 << 20
	// multipathdTextMax limits replies that are not JSON. `show config local`
	// of a host with hundreds of devices sections stays below.
	multipathdTextMax = 1 << 20
)

// errMultipathdTimeout is multipathd's own answer when it could not get the
// lock over its tables within uxsock_timeout.
var errMultipathdTimeout = errors.New(`multipathd answered "timeout": it could not get at its own tables in time`)

// multipathdConn is one conversation with multipathd. Requests and replies have
// the same frame: a length in the host's byte order and word size (8 bytes on
// the platforms there are), then as many bytes, the last of them NUL
// (libmpathcmd/mpath_cmd.c).
type multipathdConn struct {
	net.Conn
	r *bufio.Reader
	// address is what was dialled, for evidence.
	address string
}

// dialMultipathd connects to a multipathd that is known to run: where systemd
// holds the socket, connecting to it would start the daemon otherwise.
func dialMultipathd(ctx context.Context, v host.View) (*multipathdConn, error) {
	address := multipathdAbstract
	switch _, err := v.Stat(ctx, multipathdPath); {
	case err == nil:
		address = multipathdPath
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	conn, err := v.Dial(ctx, "unix", address)
	if err != nil {
		return nil, err
	}
	return &multipathdConn{Conn: conn, r: bufio.NewReaderSize(conn, 64<<10), address: address}, nil
}

// ask sends one command and hands the body of the reply, without its NUL, to
// read. What read leaves over is skipped, so that the next reply is found.
func (c *multipathdConn) ask(command string, read func(io.Reader) error) error {
	frame := binary.NativeEndian.AppendUint64(nil, uint64(len(command)+1))
	frame = append(append(frame, command...), 0)
	if _, err := c.Write(frame); err != nil {
		return fmt.Errorf("%q: %w", command, err)
	}
	if err := readMultipathdReply(c.r, read); err != nil {
		return fmt.Errorf("%q: %w", command, err)
	}
	return nil
}

func readMultipathdReply(r *bufio.Reader, read func(io.Reader) error) error {
	var header [8]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return err
	}
	size := binary.NativeEndian.Uint64(header[:])
	if size == 0 || size > multipathdReplyMax {
		return fmt.Errorf("the reply claims %d bytes, which is no multipathd reply", size)
	}
	body := &io.LimitedReader{R: r, N: int64(size) - 1}
	err := read(body)
	if _, skip := io.Copy(io.Discard, body); err == nil {
		err = skip
	}
	if body.N > 0 {
		return cmp.Or(err, io.ErrUnexpectedEOF)
	}
	end, last := r.ReadByte()
	if last == nil && end != 0 {
		last = errors.New("the reply does not end with NUL")
	}
	return cmp.Or(err, last)
}

// text asks for a reply in words.
func (c *multipathdConn) text(command string) (string, error) {
	var text string
	err := c.ask(command, func(r io.Reader) error {
		data, err := io.ReadAll(io.LimitReader(r, multipathdTextMax))
		text = strings.TrimSpace(string(data))
		return err
	})
	if err != nil {
		return "", err
	}
	return text, refusalOfMultipathd(text)
}

// refusalOfMultipathd tells multipathd's failures from its answers: they are
// plain words without any code (multipathd/uxlsnr.c).
func refusalOfMultipathd(text string) error {
	first, rest, _ := strings.Cut(text, "\n")
	switch strings.TrimSpace(first) {
	case "timeout":
		return errMultipathdTimeout
	case "fail":
		why, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
		return fmt.Errorf("multipathd answered %q", strings.TrimSpace("fail "+why))
	}
	return nil
}

// maps asks for all maps and their paths. Nothing in the answer counts up while
// all is well, and a large host's is two megabytes: it is only compared with the
// last one as it passes by, and asked for again to be parsed where it differs.
func (c *multipathdConn) maps(memory *Memory) ([]multipathdMap, error) {
	const command, key = "show maps json", "multipathd's maps"
	said, known := Kept[multipathdAnswer](memory, key)
	if known {
		same := false
		err := c.ask(command, func(r io.Reader) error {
			var h maphash.Hash
			h.SetSeed(said.seed)
			n, err := io.Copy(&h, r)
			same = n == said.length && h.Sum64() == said.sum
			return err
		})
		if err != nil {
			return nil, err
		}
		if same {
			return said.maps, nil
		}
	}
	var maps []multipathdMap
	err := c.ask(command, func(r io.Reader) error {
		var h maphash.Hash
		passed := countedReader{r: io.TeeReader(r, &h)}
		var err error
		if maps, err = parseMultipathdMaps(&passed); err != nil {
			return err
		}
		// The decoder leaves what is behind the last brace.
		if _, err = io.Copy(io.Discard, &passed); err == nil {
			memory.Keep(key, multipathdAnswer{h.Seed(), h.Sum64(), passed.n, maps})
		}
		return err
	})
	return maps, err
}

// multipathdAnswer is what was understood of an answer, and its fingerprint.
type multipathdAnswer struct {
	seed   maphash.Seed
	sum    uint64
	length int64
	maps   []multipathdMap
}

type countedReader struct {
	r io.Reader
	n int64
}

func (c *countedReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// multipathdMap is what `show maps json` says about a map, as far as the kernel
// does not know it better.
type multipathdMap struct {
	Name string `json:"name"`
	// WWID is called uuid there: the dm uuid without "mpath-".
	WWID  string `json:"uuid"`
	Sysfs string `json:"sysfs"`
	// Queueing is "-", "off", "on", "N sec" or "N chk".
	Queueing string `json:"queueing"`
	Features string `json:"features"`
	DMState  string `json:"dm_st"`
	Groups   []struct {
		Paths []multipathdPathState `json:"paths"`
	} `json:"path_groups"`
}

// multipathdPathState is one path in `show maps json`.
type multipathdPathState struct {
	Dev string `json:"dev"`
	// DevT is "8:16".
	DevT string `json:"dev_t"`
	// DMState is "active", "failed" or "undef": the kernel's opinion.
	DMState string `json:"dm_st"`
	// Checker is the path checker's opinion: "ready", "ghost" (a standby path,
	// which is well), "faulty", "shaky", "i/o pending", "i/o timeout",
	// "delayed", "disconnected", "undef".
	Checker string `json:"chk_st"`
}

// maxMultipathd is more maps, groups and paths than a host can have (minor numbers
// have 20 bits), for the shortest of them take far less room in an answer than in
// memory.
const maxMultipathd = 1 << 20

// maxAnswerPart is the longest part of a JSON answer that is held, in bytes: a
// pod, or a map with thousands of paths.
const maxAnswerPart = 4 << 20

// budget is a reader that ends with an error when more is taken than is left; a
// JSON decoder holds as much as one value has.
type budget struct {
	r    io.Reader
	left int64
}

func (b *budget) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("one value of it is %w of %d bytes", host.ErrTooLarge, maxAnswerPart)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// parseMultipathdMaps decodes map by map: a host with 500 maps answers with
// some two megabytes, of which only a few words each are kept.
func parseMultipathdMaps(r io.Reader) ([]multipathdMap, error) {
	br := bufio.NewReaderSize(r, 4096)
	// Failures are words where JSON was asked for.
	if first, err := br.Peek(1); err != nil {
		return nil, jsonTrouble(err)
	} else if first[0] != '{' {
		head, err := io.ReadAll(io.LimitReader(br, 512))
		if err != nil {
			return nil, err
		}
		if err := refusalOfMultipathd(string(head)); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("multipathd answered %.60q instead of JSON", bytes.TrimSpace(head))
	}
	part := &budget{r: br, left: maxAnswerPart}
	dec := json.NewDecoder(part)
	if _, err := dec.Token(); err != nil {
		return nil, jsonTrouble(err)
	}
	var maps []multipathdMap
	known := 0
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return nil, jsonTrouble(err)
		}
		part.left = maxAnswerPart
		if key != "maps" {
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return nil, jsonTrouble(err)
			}
			continue
		}
		if open, err := dec.Token(); err != nil {
			return nil, jsonTrouble(err)
		} else if open != json.Delim('[') {
			return nil, fmt.Errorf("multipathd's maps are %v, want a list", open)
		}
		for dec.More() {
			var m multipathdMap
			part.left = maxAnswerPart
			if err := dec.Decode(&m); err != nil {
				return nil, jsonTrouble(err)
			}
			known++
			for _, g := range m.Groups {
				known += 1 + len(g.Paths)
				if slices.ContainsFunc(g.Paths, func(p multipathdPathState) bool { return p.DevT == "" }) {
					return nil, errors.New("multipathd speaks of a path without a device")
				}
			}
			if m.WWID == "" {
				return nil, errors.New("multipathd speaks of a map without an identity")
			}
			if known > maxMultipathd {
				return nil, fmt.Errorf("multipathd speaks of more than %d maps, groups and paths", maxMultipathd)
			}
			maps = append(maps, m)
		}
		if _, err := dec.Token(); err != nil {
			return nil, jsonTrouble(err)
		}
	}
	if _, err := dec.Token(); err != nil {
		return nil, jsonTrouble(err)
	}
	return maps, nil
}

// jsonTrouble makes the end of a frame in the middle of JSON look like what it
// is, not like a closed connection.
func jsonTrouble(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("multipathd's JSON ends early")
	}
	return fmt.Errorf("multipathd's JSON is not understood: %w", err)
}

// multipathdSilent tells a daemon that does not serve from an answer that is
// not understood. A stopped or stuck daemon takes connections until its backlog
// of 10 is full and then refuses them with EAGAIN.
func multipathdSilent(err error) bool {
	return errors.Is(err, errMultipathdTimeout) ||
		errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, host.ErrNoReply) ||
		errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// multipathConfig is a configuration in the brace format of multipath.conf(5),
// unquoted.
type multipathConfig struct {
	// sections holds the settings directly in each top-level section; nil for a
	// configuration that was not read.
	sections map[string]map[string]string
	// devices are the device sections, the built-in ones first.
	devices []map[string]string
}

// setting is the value that is in force for devices without one of their own:
// `overrides` goes before `defaults`.
func (c multipathConfig) setting(key string) (string, bool) {
	for _, section := range []string{"overrides", "defaults"} {
		if v, ok := c.sections[section][key]; ok {
			return v, true
		}
	}
	return "", false
}

// deviceSetting is the value that is in force for a device: between `overrides`
// and `defaults` stands the last device section whose patterns match it and
// that has the key (libmultipath/config.c, find_hwe).
func (c multipathConfig) deviceSetting(vendor, product, key string) (string, bool) {
	if v, ok := c.sections["overrides"][key]; ok {
		return v, true
	}
	for _, d := range slices.Backward(c.devices) {
		if v, ok := d[key]; ok && multipathPattern(d["vendor"], vendor) && multipathPattern(d["product"], product) {
			return v, true
		}
	}
	return c.setting(key)
}

// multipathPattern matches as multipathd does: an extended regular expression
// that may match a part; "*" alone, which is none, is written for everything.
func multipathPattern(pattern, text string) bool {
	if pattern == "" || pattern == "*" {
		return pattern == "*"
	}
	re, err := regexp.CompilePOSIX(pattern)
	return err == nil && re.MatchString(text)
}

// parseMultipathConfig parses `show config` and `show config local`. Of
// subsections only devices' are kept; those that hold for one protocol or one
// map are left out.
func parseMultipathConfig(data []byte) (multipathConfig, error) {
	conf := multipathConfig{sections: map[string]map[string]string{}}
	var section string
	depth := 0
	number := 0
	for line := range bytes.Lines(data) {
		number++
		text := strings.TrimSpace(string(line))
		switch {
		case text == "" || text[0] == '#' || text[0] == '!':
		case text == "}":
			if depth--; depth < 0 {
				return multipathConfig{}, fmt.Errorf("line %d closes a section that was never opened", number)
			}
		case strings.HasSuffix(text, "{"):
			name := strings.TrimSpace(strings.TrimSuffix(text, "{"))
			switch {
			case depth == 0:
				section = name
				if conf.sections[section] == nil {
					conf.sections[section] = map[string]string{}
				}
			case depth == 1 && section == "devices" && name == "device":
				conf.devices = append(conf.devices, map[string]string{})
			}
			depth++
		case depth == 0:
			return multipathConfig{}, fmt.Errorf("line %d: a setting outside any section", number)
		case depth == 1 || depth == 2 && section == "devices" && len(conf.devices) > 0:
			into := conf.sections[section]
			if depth == 2 {
				into = conf.devices[len(conf.devices)-1]
			}
			key, value, _ := strings.Cut(text, " ")
			into[key] = strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	if depth != 0 {
		return multipathConfig{}, fmt.Errorf("section %q is not closed", section)
	}
	return conf, nil
}
