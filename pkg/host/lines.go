package host

import "bytes"

// Lines makes whole lines of the pieces of a file that [Files.ReadThrough] hands
// out.
type Lines struct {
	// Each is given every line that ended, its newline included; it is valid
	// during the call.
	Each func(line []byte)
	rest []byte
}

// Take takes the next piece.
func (l *Lines) Take(piece []byte) {
	for len(piece) > 0 {
		end := bytes.IndexByte(piece, '\n') + 1
		if end == 0 {
			l.rest = append(l.rest, piece...)
			return
		}
		line := piece[:end]
		if len(l.rest) > 0 {
			l.rest = append(l.rest, line...)
			line = l.rest
		}
		l.Each(line)
		l.rest, piece = l.rest[:0], piece[end:]
	}
}

// Rest is the beginning of a line that has not ended, empty without one.
func (l *Lines) Rest() []byte { return l.rest }
