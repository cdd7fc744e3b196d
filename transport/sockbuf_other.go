//go:build !unix

package transport

import "net"

// growBuffers asks for large socket buffers. What was granted can't be read here, so it is taken as granted.
func growBuffers(c *net.UDPConn) (read, write int) {
	_ = c.SetReadBuffer(wantedUDPBuffer)
	_ = c.SetWriteBuffer(wantedUDPBuffer)
	return wantedUDPBuffer, wantedUDPBuffer
}
