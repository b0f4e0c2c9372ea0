package host

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
)

// busStream is a connection to a message bus as its library may see it: every user
// of the host may send signals to any connection of the system bus, of up to 32 MB
// and with open files in them, and the library decodes what comes. Only answers are
// let through, and small signals where they are listened for. Files never are: the
// library does not offer to take any on a connection that is no *net.UnixConn, so
// that the bus refuses them.
type busStream struct {
	net.Conn
	in      *bufio.Reader
	signals bool
	// begun: the authentication is over, messages follow.
	begun bool
	// left is what is still to be read of the message under way, or of what the
	// authentication may say.
	left int64
}

const (
	// maxBusAnswer is more than systemd needs to list ten thousand units.
	maxBusAnswer = 4 << 20
	// maxBusSignal is more than all properties of a unit.
	maxBusSignal = 64 << 10
	maxBusAuth   = 16 << 10
)

func newBusStream(conn net.Conn, signals bool) *busStream {
	return &busStream{Conn: conn, in: bufio.NewReader(conn), signals: signals, left: maxBusAuth}
}

// Write notes the last line of the authentication, which the library writes at
// once and before it reads messages.
func (s *busStream) Write(p []byte) (int, error) {
	if !s.begun && string(p) == "BEGIN\r\n" {
		s.begun, s.left = true, 0
	}
	return s.Conn.Write(p)
}

func (s *busStream) Read(p []byte) (int, error) {
	for s.left == 0 {
		if !s.begun {
			return 0, errors.New("the authentication of the bus has no end")
		}
		if err := s.next(); err != nil {
			return 0, err
		}
	}
	n, err := s.in.Read(p[:min(int64(len(p)), s.left)])
	s.left -= int64(n)
	return n, err
}

// next looks at the next message's head (D-Bus specification, message format) and
// skips the message when it is not to be seen.
func (s *busStream) next() error {
	head, err := s.in.Peek(16)
	if err != nil {
		return err
	}
	var order binary.ByteOrder
	switch head[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return errors.New("the bus does not send messages")
	}
	kind := head[1]
	body, fields := int64(order.Uint32(head[4:])), int64(order.Uint32(head[12:]))
	size := 16 + (fields+7)&^7 + body
	switch {
	case size > 1<<27: // the specification's limit
		return fmt.Errorf("message of the bus: %w", ErrTooLarge)
	case kind == 2 || kind == 3: // METHOD_RETURN, ERROR
		if size > maxBusAnswer {
			return fmt.Errorf("answer over the bus: %w", ErrTooLarge)
		}
	case kind != 4 || !s.signals || size > maxBusSignal: // SIGNAL
		_, err := s.in.Discard(int(size))
		return err
	}
	s.left = size
	return nil
}
