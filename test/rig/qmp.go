package rig

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// monitor is one connection to QEMU's control socket, which serves one client
// at a time: it is opened for a command and closed at once.
type monitor struct {
	conn net.Conn
	dec  *json.Decoder
}

type qmpMessage struct {
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
	Event  string
	Data   json.RawMessage
}

func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("reaching QEMU: %w", err)
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	if err := conn.SetDeadline(deadline); err != nil {
		conn.Close()
		return nil, fmt.Errorf("reaching QEMU: %w", err)
	}
	m := &monitor{conn: conn, dec: json.NewDecoder(conn)}
	var greeting json.RawMessage
	if err := m.dec.Decode(&greeting); err != nil {
		conn.Close()
		return nil, fmt.Errorf("reading QEMU's greeting: %w", err)
	}
	if _, err := m.execute("qmp_capabilities", nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) execute(command string, args any) (json.RawMessage, error) {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	if err := json.NewEncoder(m.conn).Encode(request); err != nil {
		return nil, fmt.Errorf("QEMU %s: %w", command, err)
	}
	for {
		var msg qmpMessage
		if err := m.dec.Decode(&msg); err != nil {
			return nil, fmt.Errorf("QEMU %s: %w", command, err)
		}
		switch {
		case msg.Error != nil:
			return nil, fmt.Errorf("QEMU %s: %s: %s", command, msg.Error.Class, msg.Error.Desc)
		case msg.Return != nil:
			return msg.Return, nil
		}
	}
}

// event waits for an event that accept wants.
func (m *monitor) event(name string, accept func(data json.RawMessage) bool) error {
	for {
		var msg qmpMessage
		if err := m.dec.Decode(&msg); err != nil {
			return fmt.Errorf("waiting for QEMU's event %s: %w", name, err)
		}
		if msg.Event == name && accept(msg.Data) {
			return nil
		}
	}
}
