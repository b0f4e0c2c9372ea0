package probes

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/hosthygiene/agent/pkg/host"
)

// The command protocol of chronyd, version 6, as far as the time probe needs
// it: requests that chronyd answers to anybody on the loopback interface. All
// integers are big-endian. (chrony's candm.h and cmdmon.c; every length below
// was seen on the wire of chronyd 4.3 and 4.6.)
const (
	chronyVersion = 6
	// A request must be as long as its reply, or chronyd refuses it: otherwise
	// it could be abused to amplify traffic.
	chronyRequestHeader = 20
	chronyReplyHeader   = 28

	chronyNSources   = 14
	chronySourceData = 15
	chronyTracking   = 33

	chronyUDP  = "127.0.0.1:323"
	chronySock = "/run/chrony/chronyd.sock"

	// chronyMaxSources bounds the questions asked in one pass.
	chronyMaxSources = 64

	leapUnsynchronised = 3
	// refLocal is the reference ID 127.127.1.1 of `local stratum`: chronyd
	// follows its own clock.
	refLocal = 0x7f7f0101
)

// chronyTrack is the reply to TRACKING: what chronyd thinks of the clock.
type chronyTrack struct {
	refID    uint32
	address  netip.Addr
	stratum  uint16
	leap     uint16
	refTime  time.Time
	offset   time.Duration // positive: the clock is slow of NTP time
	delay    time.Duration // root delay
	disp     time.Duration // root dispersion
	interval time.Duration // between the last two updates
}

// bound is chronyc(1)'s "absolute bound on the computer's clock accuracy".
func (t chronyTrack) bound() time.Duration { return t.disp + t.delay/2 + t.offset.Abs() }

// chronySource is one reply to SOURCE_DATA.
type chronySource struct {
	address netip.Addr
	poll    int // log2 seconds
	state   uint16
	mode    uint16
	reach   uint16 // shift register of the last eight polls, latest in bit 0
	stratum uint16
	since   time.Duration
	never   bool // there has been no sample yet
	// offset and bound are of the last sample. As in chronyTrack a positive offset
	// is a slow clock; the protocol has it the other way round here (chronyc(1)).
	offset, bound time.Duration
}

var chronyStates = [...]string{"selected", "not selectable", "falseticker", "too variable", "not combined", "selectable"}

func (s chronySource) stateName() string {
	if int(s.state) < len(chronyStates) {
		return chronyStates[s.state]
	}
	return fmt.Sprintf("state %d", s.state)
}

// answered reports whether any of the last three polls drew a reply. The
// register keeps eight polls, which at a poll of 1,024 s is more than two hours
// of a dead server.
func (s chronySource) answered() bool { return s.reach&0o7 != 0 }

// usable reports whether chronyd could follow the source.
func (s chronySource) usable() bool { return s.state == 0 || s.state == 4 || s.state == 5 }

// chronyState is what one conversation with chronyd tells.
type chronyState struct {
	via      string
	tracking chronyTrack
	sources  []chronySource
}

// errChronyClosed: chronyd runs and offers no command port (cmdport 0). With
// fs.ErrPermission it may offer one that is not for us.
var errChronyClosed = errors.New("chronyd offers neither its command port nor its socket")

// askChrony speaks to chronyd on UDP first, because that needs nothing of ours
// on the host; the Unix socket needs a client socket beside it for a moment.
func askChrony(ctx context.Context, h host.View) (chronyState, error) {
	var state chronyState
	err := errChronyClosed
	for _, at := range []struct{ network, address string }{{"udp", chronyUDP}, {"unixgram", chronySock}} {
		var conn net.Conn
		conn, dialErr := h.Dial(ctx, at.network, at.address)
		if dialErr != nil {
			switch {
			case errors.Is(dialErr, fs.ErrPermission):
				err = fmt.Errorf("%w, as far as can be seen: %w", errChronyClosed, dialErr)
			case !closedPort(dialErr):
				err = dialErr
			}
			continue
		}
		state, err = converse(ctx, conn)
		conn.Close()
		state.via = at.network + " " + at.address
		if !closedPort(err) {
			return state, err
		}
		err = errChronyClosed
	}
	return state, err
}

func converse(ctx context.Context, conn net.Conn) (chronyState, error) {
	var s chronyState
	reply, err := chronyAsk(ctx, conn, chronyTracking, nil, 104)
	if err != nil {
		return s, err
	}
	if s.tracking, err = parseChronyTracking(reply); err != nil {
		return s, err
	}
	if reply, err = chronyAsk(ctx, conn, chronyNSources, nil, 32); err != nil {
		return s, err
	}
	n, err := parseChronyNSources(reply)
	if err != nil {
		return s, err
	}
	for i := range min(n, chronyMaxSources) {
		reply, err := chronyAsk(ctx, conn, chronySourceData, binary.BigEndian.AppendUint32(nil, i), 76)
		if errors.Is(err, errNoSuchSource) {
			break // removed since we counted
		}
		if err != nil {
			return s, err
		}
		src, err := parseChronySource(reply)
		if err != nil {
			return s, err
		}
		s.sources = append(s.sources, src)
	}
	return s, nil
}

// chronyAsk sends one request and waits for its reply. Replies to earlier
// requests are passed over: a chronyd that was stopped for a while answers
// everything that piled up once it goes on.
func chronyAsk(ctx context.Context, conn net.Conn, command uint16, body []byte, length int) ([]byte, error) {
	request := make([]byte, length)
	request[0], request[1] = chronyVersion, 1
	binary.BigEndian.PutUint16(request[4:], command)
	seq := request[8:12]
	rand.Read(seq)
	copy(request[chronyRequestHeader:], body)
	deadline, ok := ctx.Deadline()
	if d := time.Now().Add(2 * time.Second); !ok || d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := conn.Write(request); err != nil {
		return nil, err
	}
	buf := make([]byte, 512)
	for range 512 {
		n, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("chronyd did not reply within 2s: %w", host.ErrNoReply)
		}
		if err != nil {
			return nil, err
		}
		reply := buf[:n]
		if n < chronyReplyHeader || string(reply[16:20]) != string(seq) {
			continue
		}
		return reply, checkChronyHeader(reply, command)
	}
	return nil, errors.New("chronyd answers, but never what was asked")
}

var errNoSuchSource = errors.New("chronyd: no such source")

func checkChronyHeader(reply []byte, command uint16) error {
	if len(reply) < chronyReplyHeader {
		return fmt.Errorf("chronyd: reply of %d bytes is too short", len(reply))
	}
	if reply[0] != chronyVersion || reply[1] != 2 {
		return fmt.Errorf("chronyd: reply of protocol version %d type %d, want version 6 type 2", reply[0], reply[1])
	}
	if got := binary.BigEndian.Uint16(reply[4:]); got != command {
		return fmt.Errorf("chronyd: reply to command %d, asked %d", got, command)
	}
	switch status := binary.BigEndian.Uint16(reply[8:]); status {
	case 0:
		return nil
	case 2:
		return errors.New("chronyd: not authorised (opencommands)")
	case 4:
		return errNoSuchSource
	default:
		return fmt.Errorf("chronyd: refused with status %d", status)
	}
}

func chronyBody(reply []byte, code uint16, length int) ([]byte, error) {
	if len(reply) < length {
		return nil, fmt.Errorf("chronyd: reply of %d bytes, want %d", len(reply), length)
	}
	if got := binary.BigEndian.Uint16(reply[6:]); got != code {
		return nil, fmt.Errorf("chronyd: reply code %d, want %d", got, code)
	}
	return reply[chronyReplyHeader:], nil
}

func parseChronyNSources(reply []byte) (uint32, error) {
	b, err := chronyBody(reply, 2, 32)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

func parseChronyTracking(reply []byte) (chronyTrack, error) {
	b, err := chronyBody(reply, 5, 104)
	if err != nil {
		return chronyTrack{}, err
	}
	be := binary.BigEndian
	return chronyTrack{
		refID:    be.Uint32(b),
		address:  chronyAddr(b[4:24]),
		stratum:  be.Uint16(b[24:]),
		leap:     be.Uint16(b[26:]),
		refTime:  chronyTime(b[28:40]),
		offset:   chronyFloat(b[40:]),
		delay:    chronyFloat(b[64:]),
		disp:     chronyFloat(b[68:]),
		interval: chronyFloat(b[72:]),
	}, nil
}

func parseChronySource(reply []byte) (chronySource, error) {
	b, err := chronyBody(reply, 3, 76)
	if err != nil {
		return chronySource{}, err
	}
	be := binary.BigEndian
	since := be.Uint32(b[32:])
	return chronySource{
		address: chronyAddr(b[:20]),
		poll:    int(int16(be.Uint16(b[20:]))),
		stratum: be.Uint16(b[22:]),
		state:   be.Uint16(b[24:]),
		mode:    be.Uint16(b[26:]),
		reach:   be.Uint16(b[30:]),
		since:   time.Duration(since) * time.Second,
		never:   since == math.MaxUint32,
		offset:  -chronyFloat(b[40:]),
		bound:   chronyFloat(b[44:]),
	}, nil
}

// chronyAddr decodes an IPAddr: 16 bytes of address, the family, two of padding.
// Reference clocks have family 0 or an ID (3).
func chronyAddr(b []byte) netip.Addr {
	switch binary.BigEndian.Uint16(b[16:]) {
	case 1:
		return netip.AddrFrom4([4]byte(b[:4]))
	case 2:
		return netip.AddrFrom16([16]byte(b[:16]))
	}
	return netip.Addr{}
}

func chronyTime(b []byte) time.Time {
	high, low := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
	if high == 0x7fffffff { // "no seconds above 32 bits"
		high = 0
	}
	return time.Unix(int64(high)<<32|int64(low), int64(binary.BigEndian.Uint32(b[8:])))
}

// chronyFloat decodes chrony's own 32-bit float, in seconds: a signed 7-bit
// exponent e and a signed 25-bit coefficient c, value c * 2^(e-25).
func chronyFloat(b []byte) time.Duration {
	x := binary.BigEndian.Uint32(b)
	exp, coef := int32(x)>>25, int32(x<<7)>>7
	seconds := math.Ldexp(float64(coef), int(exp)-25)
	// A century is as good as for ever, and sums of such values do not wrap.
	const century = 100 * 365 * 24 * 3600
	return time.Duration(math.Round(min(max(seconds, -century), century) * 1e9))
}
