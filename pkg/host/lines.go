package host

import "bytes"

// MaxLine is the longest line that [Lines] holds, in bytes: four times the mount
// of an overlay with as many layers as the kernel allows. A file without
// newlines would be held as a whole otherwise.
const MaxLine = 1 << 20

// Lines makes whole lines of the pieces of a file that [Files.ReadThrough] hands
// out.
type Lines struct {
	// Each is given every line that ended, its newline included; it is valid
	// during the call. A line longer than MaxLine is cut and has no newline.
	Each func(line []byte)
	rest []byte
}

// Take takes the next piece.
func (l *Lines) Take(piece []byte) {
	for len(piece) > 0 {
		end := bytes.IndexByte(piece, '\n') + 1
		if end == 0 {
			l.hold(piece)
			return
		}
		line := piece[:end]
		if len(l.rest) > 0 {
			l.hold(line)
			line = l.rest
		}
		l.Each(line[:min(len(line), MaxLine)])
		l.rest, piece = l.rest[:0], piece[end:]
	}
}

func (l *Lines) hold(part []byte) {
	l.rest = append(l.rest, part[:min(len(part), MaxLine-len(l.rest))]...)
}

// Rest is the beginning of a line that has not ended, empty without one.
func (l *Lines) Rest() []byte { return l.rest }
